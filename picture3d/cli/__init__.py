"""The command line. Every command is a thin shell around one function in `picture3d.commands`, imported when it is called."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from picture3d.cli import data, look, score, start, train, weights
from picture3d.errors import Picture3dError

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From raw LiDAR logs to a pre-trained encoder (PICTURE), and from the encoder to fine-tuned, scored networks.",
    epilog="Start with: picture3d demo",
)
for part in (start, data, train, score, look):  # in the order in which a user meets them
    app.add_typer(part.app)
app.add_typer(weights.app, name="weights", rich_help_panel="Comparisons and reports")


def _version(value: bool) -> None:
    if value:
        from picture3d import __version__

        typer.echo(f"picture3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: our own errors, and the system's, become one line on standard error and status 2; Ctrl-C status 130."""
    try:
        app()
    except Picture3dError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # what no reader or writer of ours has put into words: a disk that failed, a folder without rights
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(
            f"error: {place}{error.strerror or error}. Check the path, its rights and the space on its disk; "
            "what is finished is kept, the same command goes on from it",
            err=True,
        )
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        # The library beneath turns Ctrl-C into a silent exit of status 130 before it gets here.
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        typer.echo("interrupted; the same command goes on from what is finished (training: add --resume)", err=True)
        sys.exit(_INTERRUPTED)
