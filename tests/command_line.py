"""Commands as a user types them, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from picture3d.cli import app


def do(*words: object) -> str:
    """Runs a command that has to succeed; returns what it printed. Our own errors come through as they are."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
