"""Where a new user begins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from picture3d.cli.shell import Threads, show

_PANEL = "Start here"  # of `picture3d --help`
app = typer.Typer()


@app.command(rich_help_panel=_PANEL)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo; a second run goes on from what is finished.")] = Path(
        "demo"
    ),
    tiny: Annotated[bool, typer.Option("--tiny", help="The same steps on a handful of frames, in under a minute.")] = False,
    threads: Threads = 0,
) -> None:
    """See the whole of PICTURE work on a built-in town: data, teacher, pre-training, fine-tuning, scores, report."""
    from picture3d.commands.demo import demo as command

    show(command(out, tiny=tiny, threads=threads))


@app.command(rich_help_panel=_PANEL)
def doctor(
    folder: Annotated[Path, typer.Option(help="Where data is to be written; its disk is looked at.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    threads: Threads = 0,
) -> None:
    """Versions, devices, threads, a small speed test, free disk, and which optional parts are missing."""
    from picture3d.commands.doctor import doctor as command

    show(command(folder=folder, threads=threads, as_json=as_json))
