"""`picture3d weights`: looking into checkpoints, exchanging them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from picture3d.cli.shell import AllowPartial, show

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints; exchange them with OpenPCDet's layout.")
WeightsRecipe = Annotated[str | None, typer.Option("--recipe", help="Compare with the network of this recipe.")]


@app.command("show")
def weights_show(
    file: Annotated[Path, typer.Argument(help="Run folder, .safetensors, or a .pth of OpenPCDet.")],
    recipe: WeightsRecipe = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape.")] = False,
) -> None:
    """List what a checkpoint holds and how it fits a recipe's network."""
    from picture3d.commands.weights import show as command

    show(command(file, recipe=recipe, tensors=tensors))


@app.command("import")
def weights_import(
    file: Annotated[Path, typer.Argument(help="A .pth of OpenPCDet (PICTURE, GPICTURE, DSVT), or a .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    recipe: WeightsRecipe = None,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Take vfe and backbone_3d alone.")] = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Turn a checkpoint of OpenPCDet into one of ours."""
    from picture3d.commands.weights import import_weights as command

    show(command(file, out, recipe=recipe, encoder_only=encoder_only, allow_partial=allow_partial))


@app.command("export")
def weights_export(
    source: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors to write, under OpenPCDet's names.")],
) -> None:
    """Write a run's network under OpenPCDet's names."""
    from picture3d.commands.weights import export_weights as command

    show(command(source, out))
