"""Files that exist whole or not at all (written aside, synced, renamed), bounded reading, folders with one writer."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from picture3d.errors import ConfigError, DataError

PARTIAL_SUFFIX = ".partial"
_NEVER_NS = 0  # a time of change that says that nobody has written to a file
# A Path keeps one of the two slashes. A drive letter of Windows is one letter.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+(.*)$", re.DOTALL)


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    The temporary name is ``<path><mark>.partial``; a left-over of a killed run is overwritten, an error removes it and leaves
    what stood at `path` before. The data and the folder are synced, so after the block the file survives a power cut. While the
    block runs the temporary file is locked, so that two processes never write into each other's.

    Raises:
        DataError: if the folder cannot be written, the disk is full, or another process is writing the same file.
    """
    refuse_url(path)
    partial = path.with_name(path.name + mark + PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _own(partial)
    except OSError as error:
        raise _unwritable(path, error) from error
    if handle is None:
        raise DataError(f"{path}: another process is writing this file. Wait for it, or choose another name.")
    try:
        yield partial
        with partial.open("rb+") as file:
            if os.fstat(file.fileno()).st_mtime_ns == _NEVER_NS:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(partial))
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise _unwritable(path, error) from error
    except BaseException:
        _remove(partial)
        raise
    finally:
        _disown(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that takes its name `path` only when the block ends without an error; see :func:`replacing`.

    Raises:
        DataError: if the folder cannot be written or the disk is full.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all.

    Raises:
        DataError: if the file cannot be written.
    """
    rank, world = job_share()
    # The processes of a job may write the same small file at the same moment, each under a temporary name of its own.
    with replacing(path, "" if world == 1 else f".{rank}") as partial, partial.open("wb") as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Adds a line to `path`; of a crash in its middle a torn last line remains.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def write_json(path: Path, tree: Any) -> None:
    """Writes `tree` as indented JSON, whole or not at all.

    Raises:
        DataError: if the file cannot be written.
    """
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def write_json_first(path: Path, tree: Any) -> None:
    """As :func:`write_json`, but what another process put there in the meantime stays: read the file to see who was first.

    Raises:
        DataError: if the file cannot be written.
    """
    own = path.with_name(f"{path.name}.{job_share()[0]}{PARTIAL_SUFFIX}")
    write_json(own, tree)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without links
        if not path.exists():
            os.replace(own, path)
    finally:
        _remove(own)
    _sync_folder(path.parent)


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DataError: if the file is missing, larger than `max_bytes`, not JSON, or not one object.
    """
    return parse_json_object(read_bounded(path, max_bytes=max_bytes), str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names it in messages.

    Raises:
        DataError: if it is not JSON, or not one object.
    """
    tree = _parse_json(data, where)
    if not isinstance(tree, dict):
        raise DataError(
            f"{where}: expected one JSON object, found {type(tree).__name__}. Check that this is the right file, or write it "
            "again."
        )
    return tree


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The JSON value in `path`.

    Raises:
        DataError: if the file is missing, larger than `max_bytes`, or not JSON.
    """
    return _parse_json(read_bounded(path, max_bytes=max_bytes), str(path))


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """The bytes of `path`.

    Raises:
        DataError: if the file is missing, larger than `max_bytes`, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            # Not the bound itself: a buffer of that size would be made for the smallest file.
            data = file.read(min(max_bytes, max(os.fstat(file.fileno()).st_size, 1 << 16)) + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > max_bytes:
        raise DataError(f"{path}: more than the {max_bytes} bytes such a file may have. Check that this is the right file.")
    return data


def unreadable(path: Path, error: OSError) -> DataError:
    """What to raise where the system does not give a file: it is not there, or it or its disk refuses."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file. Check the name, and the folder it should be in.")
    return DataError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions and the disk it lies on.")


def split_url(path: Path | str) -> tuple[str, str] | None:
    """Scheme and what follows its slashes, or None where `path` is one of this machine."""
    found = _URL.match(str(path))
    return None if found is None else (found.group(1), found.group(2))


def refuse_url(path: Path) -> None:
    """Lets the paths of this machine pass, before a folder called ``s3:`` is made.

    Raises:
        DataError: if `path` is a URL: frames may be read from one, nothing is written to one.
    """
    if split_url(path) is not None:
        raise DataError(
            f"{path}: nothing is written to a URL. Name a folder of this machine, and upload that when it is whole."
        )


LOCK_NAME = ".writer.lock"


def job_share(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Which part of a job's logs is this process's: number `rank` of `world`, as ``torchrun`` or the user says it by RANK and
    WORLD_SIZE; (0, 1) if nobody does.

    Raises:
        ConfigError: if only one of the two is set, or they are no numbers, or contradict each other.
    """
    found = os.environ if environment is None else environment
    said = found.get("RANK"), found.get("WORLD_SIZE")
    if said == (None, None):
        return 0, 1
    try:
        rank, world = (int(value) for value in said if value is not None)
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={said[0]} and WORLD_SIZE={said[1]} of the environment name no part of a job. Start with torchrun, set both "
            "(0 <= RANK < WORLD_SIZE), or unset both."
        )
    return rank, world


_MAX_LOCK_BYTES = 4096
_JOB_PATIENCE_S = 3.0
_held: dict[Path, int] = {}  # folders that this process writes to, and how often it said so


@contextmanager
def sole_writer(folder: Path, *, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """While the block runs, no other process that asks may write to `folder`; the same process may ask again.

    With a `share` (rank, world) the processes of one job write side by side, each rank once. Another job is kept out.

    The lock is the operating system's, on a file in the folder that names the holder: it ends with the process, however that
    ends, and the next one takes the file over. The file, and a folder that stayed empty, are removed when the block ends.
    Where files cannot be locked (no ``fcntl``, some network disks) nothing is held.

    Raises:
        DataError: naming the process that holds the folder; or if the folder cannot be written.
    """
    refuse_url(folder)
    place = Path(folder).resolve()
    if place in _held:
        _held[place] += 1
        try:
            yield
        finally:
            _held[place] -= 1
        return
    made = not place.exists()
    rank, world = share
    handles = [(LOCK_NAME, _lock(place, world))]
    if world > 1:
        try:
            handles.append((f"{LOCK_NAME}.{rank}", _lock(place, 1, f"{LOCK_NAME}.{rank}")))
        except DataError:
            _unlock(place, handles, world)
            raise
    _held[place] = 1
    try:
        yield
    finally:
        del _held[place]
        _unlock(place, handles, world)
        if made:
            with suppress(OSError):  # a folder that nothing was written to was made for the lock alone
                place.rmdir()


def _own(path: Path) -> int | None:
    """Opens the file, made if need be, and locks it; None if another process holds it. Without locks it is only opened."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            held = _hold(handle, shared=False)
        except (ImportError, OSError):  # no locks here
            return handle
        # The one that held it may have given the file its name, or removed it, between opening and locking.
        with suppress(OSError):
            if held and os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.utime(path, ns=(_NEVER_NS, _NEVER_NS))  # opening it to write sets the time, even if nothing follows
                return handle
        os.close(handle)
        if not held:
            return None


def _disown(handle: int) -> None:
    with suppress(ImportError, OSError):  # a process forked in the meantime keeps the file open, and would keep the lock
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _unlock(folder: Path, handles: list[tuple[str, int | None]], world: int) -> None:
    for name, handle in reversed(handles):
        if handle is None:
            continue
        # While it is still held, so that nobody's own file is removed; a lock of several goes with the last of them.
        if name != LOCK_NAME or world == 1 or _hold(handle, shared=False):
            # A rank that was killed left its own: nobody holds it who does not share the lock.
            for left in folder.glob(f"{LOCK_NAME}.*") if name == LOCK_NAME else ():
                _remove(left)
            _remove(folder / name)
        os.close(handle)


def _hold(handle: int, *, shared: bool) -> bool:
    """Takes the operating system's lock, or turns the one held into another kind; False if somebody else's is in the way."""
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(folder: Path, world: int = 1, name: str = LOCK_NAME) -> int | None:
    """The open file that holds the lock, or None where locks do not exist. With several processes it is shared by them."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return None
    path = folder / name
    # The others of a job hold it alone for a moment, when they come and when they go.
    patience = time.monotonic() + (_JOB_PATIENCE_S if world > 1 else 0.0)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            first = _hold(handle, shared=False)
            # Others of the same job may be here already: they share the lock, and its file says of how many they are.
            if not first and not (world > 1 and _hold(handle, shared=True) and _job_at(path) in (None, _job(world))):
                os.close(handle)
                if time.monotonic() < patience:
                    time.sleep(0.05)
                    continue
                raise DataError(
                    f"{folder}: another process writes here: {_holder(path)}. Wait for it, or choose another folder."
                )
        except OSError:
            os.close(handle)
            return None
        # The one that held it may have removed the file between opening and locking; then the name is somebody else's.
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                if not first:
                    return handle
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "command": sys.argv[:8], "since": _now()}
                os.ftruncate(handle, 0)
                if world > 1:
                    holder["job"] = _job(world)
                os.pwrite(handle, json.dumps(holder).encode()[:_MAX_LOCK_BYTES], 0)
                if world == 1 or _hold(handle, shared=True):
                    return handle
        os.close(handle)


def _job(world: int) -> str:
    """What the processes of one job have in common, and two jobs have not."""
    names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"]
    names.append("SLURM_ARRAY_JOB_ID" if "SLURM_ARRAY_JOB_ID" in os.environ else "SLURM_JOB_ID")
    return "/".join([f"{world} processes", *(os.environ.get(name, "") for name in names)])


def _job_at(path: Path) -> str | None:
    """The job that the lock file names; None if it is not written yet."""
    try:
        return str(json.loads(path.read_bytes()[:_MAX_LOCK_BYTES]).get("job", ""))
    except (OSError, ValueError, AttributeError):
        return None


def _holder(path: Path) -> str:
    try:
        tree = json.loads(path.read_bytes()[:_MAX_LOCK_BYTES])
        return f"process {tree['pid']} on {tree['host']}, since {tree['since']} ({' '.join(map(str, tree['command']))})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {path}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}). The file is damaged or cut off; write it again.") from None


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written ({error.strerror or error}). Nothing was left half-written, and what stood there before is "
        "untouched. Free some space or choose a folder that can be written, and run again: what is finished is kept."
    )


def _remove(path: Path) -> None:
    # The clean-up may fail for the same reason as the writing, and is not what the user needs to hear about.
    with suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut; without effect where folders cannot be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
