"""Training: PICTURE without labels, then a task network on few of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from picture3d.cli.shell import AllowPartial, ConfigFile, DataOption, Device, Overrides, Resume, RunFolderOption, Threads, show

_PANEL = "Training"  # of `picture3d --help`
app = typer.Typer()
finetune_app = typer.Typer(no_args_is_help=True, help="Train a task network from an encoder, or from scratch.")
app.add_typer(finetune_app, name="finetune", rich_help_panel=_PANEL)

Encoder = Annotated[
    Path | None, typer.Option("--encoder", help="Run folder or checkpoint of a pre-training; left out: from scratch.")
]
LabelShare = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of the labelled scenes to train on.")]


@app.command(rich_help_panel=_PANEL)
def pretrain(
    out: RunFolderOption,
    data: DataOption = None,
    recipe: Annotated[str, typer.Option(help="Which recipe to run; `picture3d recipes` lists them.")] = "town-picture",
    config: ConfigFile = None,
    set_: Overrides = None,
    resume: Resume = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps (the schedule is shortened).")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Pre-train an encoder with PICTURE: hide voxels, rebuild their points and the teacher's features.

    No label and no box is ever read. Coordinates only: --set loss.features_weight=0. Features only:
    --set loss.coordinates_weight=0.
    """
    from picture3d.commands.train import pretrain as command

    show(
        command(
            out,
            data=data,
            recipe=recipe,
            config=config,
            overrides=set_ or [],
            resume=resume,
            max_steps=max_steps,
            device=device,
            threads=threads,
        )
    )


def _finetune_command(task: Literal["segmentation", "detection", "occupancy"], help_: str) -> None:
    """Adds `picture3d finetune TASK`; all tasks take the same options."""

    @finetune_app.command(task, help=help_)
    def finetune(  # pyright: ignore[reportUnusedFunction]
        out: RunFolderOption,
        data: DataOption = None,
        recipe: Annotated[str, typer.Option(help="Which recipe to run; `picture3d recipes` lists them.")] = f"town-{task}",
        encoder: Encoder = None,
        label_share: LabelShare = None,
        allow_partial: AllowPartial = False,
        config: ConfigFile = None,
        set_: Overrides = None,
        resume: Resume = False,
        device: Device = "auto",
        threads: Threads = 0,
    ) -> None:
        from picture3d.commands.train import finetune as command

        show(
            command(
                out,
                task=task,
                data=data,
                recipe=recipe,
                encoder=encoder,
                label_share=label_share,
                allow_partial=allow_partial,
                config=config,
                overrides=set_ or [],
                resume=resume,
                device=device,
                threads=threads,
            )
        )


_finetune_command("segmentation", "Train LiDAR semantic segmentation on labelled keyframes.")
_finetune_command("detection", "Train a 3-D object detector on annotated keyframes.")
_finetune_command("occupancy", "Train semantic occupancy on keyframes with occupancy labels.")


@app.command(rich_help_panel=_PANEL)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's whole config as JSON.")] = None,
) -> None:
    """List the recipes, or print one."""
    from picture3d.commands.train import describe_recipes as command

    show(command(name))
