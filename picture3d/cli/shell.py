"""What all commands share: options that mean the same everywhere, how an answer is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, for example training.batch_size=4. Repeatable."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Start from a saved config.json instead of a recipe.")]
RunFolderOption = Annotated[Path, typer.Option("--out", help="Run folder: config, metrics, checkpoints, summary.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of prepared frames.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses every core.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")]
AllowPartial = Annotated[bool, typer.Option("--allow-partial", help="Accept weights that fit only in part.")]


def show(text: str) -> None:
    """Prints what a command has to say."""
    if text:  # of several processes that work as one, the first speaks
        typer.echo(text)


def told(outcome: tuple[str, bool]) -> None:
    """Shows what a command has to say; exit status 1 if not everything was well."""
    text, well = outcome
    show(text)
    if not well:
        raise typer.Exit(1)
