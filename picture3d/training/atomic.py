"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from picture3d.errors import TrainingError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. It takes the place of `path`, synced, when the block ends without error.

    After an error nothing is left of it, and what stood at `path` before still stands there.

    Raises:
        TrainingError: if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # The clean-up may fail for the same reason, and is not what the user needs to hear about.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Puts `text` at `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Adds a line to `path`.

    Raises:
        TrainingError: if it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> TrainingError:
    """The error for a file that cannot be written."""
    return TrainingError(
        f"{path}: cannot be written ({error.strerror or error}). What was there before is untouched. "
        f"Free some space or choose a folder that can be written; --resume goes on from the newest checkpoint."
    )


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut; without effect where folders cannot be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
