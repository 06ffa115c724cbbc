"""Prepared frames that lie elsewhere: a root such as ``s3://bucket/frames`` or ``https://host/frames``, read through fsspec.

Only the files that are read (logs; targets, occupancy labels and objects beside them) are fetched, whole, into a folder of this
machine that is shared by all processes and kept below a limit; the file that was not used for longest goes first. Every byte of
a file is compared with the checksums it holds before the file takes its name. Nothing here is used, and no connection is made,
unless a root is a URL.

The folder is ``PICTURE3D_CACHE`` (or ``~/.cache/picture3d``), its limit ``PICTURE3D_CACHE_GB`` (64): where things are kept is a
matter of the machine and not of a run's config.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from picture3d.errors import ConfigError, DataError
from picture3d.files import PARTIAL_SUFFIX, read_bounded, replacing, split_url

_T = TypeVar("_T")
KEPT_SUFFIX = ".p3d"  # of every file in the cache, whatever its kind
_PART_BYTES = 1 << 22
_ATTEMPTS = 4
_FIRST_WAIT_S = 0.5
_DEFAULT_GB = 64.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def remote_url(root: Path | str) -> str | None:
    """The URL that `root` stands for, or None for a folder of this machine.

    A `Path` made of ``s3://bucket/x`` reads ``s3:/bucket/x``; both are understood.
    """
    found = split_url(root)
    if found is None:
        return None
    scheme, rest = found[0].lower(), found[1].rstrip("/")
    return f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def remote_folder(root: Path | str) -> RemoteFolder | None:
    """The folder that `root` names if it is a URL, or None for a folder of this machine."""
    url = remote_url(root)
    return None if url is None else RemoteFolder(url)


def read_beside(root: Path, name: str, *, max_bytes: int) -> bytes:
    """The bytes of a small file in a folder, here or elsewhere.

    Raises:
        MissingObject: if it is not there.
        DataError: if it is larger than `max_bytes` or cannot be read.
    """
    remote = remote_folder(root)
    if remote is not None:
        return remote.read(name, max_bytes=max_bytes)
    path = Path(root) / name
    if not path.exists():
        raise MissingObject(f"{path}: no such file.")
    return read_bounded(path, max_bytes=max_bytes)


@dataclass(frozen=True, slots=True)
class LogCache:
    """Fetched files on this machine, of all remote roots together."""

    folder: Path
    max_bytes: int

    @staticmethod
    def of_machine() -> LogCache:
        """As the environment says.

        Raises:
            ConfigError: if ``PICTURE3D_CACHE_GB`` is not a positive number.
        """
        given = os.environ.get("PICTURE3D_CACHE_GB", "")
        try:
            limit = float(given) if given else _DEFAULT_GB
            if not 0 < limit < float("inf"):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"PICTURE3D_CACHE_GB={given}: not a number of gigabytes above 0. Set it to one, or unset it"
            ) from None
        folder = os.environ.get("PICTURE3D_CACHE") or str(Path.home() / ".cache" / "picture3d")
        return LogCache(Path(folder), int(limit * 1e9))

    def get(self, path: Path, size: int, fill: Callable[[Path], None]) -> Path:
        """`path`, in `folder`; made by `fill` if it is not there yet. Two processes that ask for it wait for one of them.

        Args:
            path: where the file is kept; its name ends in ``.<size>.p3d``.
            size: its bytes.
            fill: writes the file under the name it is given; what it leaves is whole and checked.

        Raises:
            DataError: if the file is larger than the limit, or the folder cannot be written; what `fill` raises.
        """
        if size > self.max_bytes:
            raise DataError(
                f"{self.folder}: may hold {self.max_bytes / 1e9:g} GB, a file of {size / 1e9:g} GB does not fit. "
                "Set PICTURE3D_CACHE_GB higher."
            )
        if self._use(path, size):
            return path
        with _locked(_lock_of(path)):
            if not self._use(path, size):
                with _locked(self.folder / ".lock"):
                    self._make_room(size, path)
                    with suppress(OSError):  # counted by the others from now on
                        path.with_name(path.name + PARTIAL_SUFFIX).touch()
                with replacing(path) as partial:
                    fill(partial)
        return path

    def _use(self, path: Path, size: int) -> bool:
        try:
            if path.stat().st_size != size:
                return False
            os.utime(path)  # the oldest time is the first to go
        except OSError:
            return False
        return True

    def _make_room(self, size: int, wanted: Path) -> None:
        """Removes the logs that were not used for longest. What others are fetching right now counts and stays."""
        used = 0
        for partial in self.folder.glob(f"*/*{KEPT_SUFFIX}{PARTIAL_SUFFIX}"):
            finished = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
            if finished == wanted:
                continue
            if _is_free(_lock_of(finished)):  # left by a process that was killed
                with suppress(OSError):
                    partial.unlink()
            else:
                used += _declared_size(finished)
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.glob(f"*/*{KEPT_SUFFIX}"):
            with suppress(OSError):
                state = path.stat()
                kept.append((state.st_mtime, state.st_size, path))
        used += sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if used + size <= self.max_bytes:
                return
            with suppress(OSError):  # a process that has it open reads on
                path.unlink()
            used -= bytes_


class RemoteFolder:
    """The files under a URL. Cheap to send to another process; connections are made when something is read."""

    def __init__(self, url: str, cache: LogCache | None = None, *, attempts: int = _ATTEMPTS) -> None:
        """Remembers where things are.

        Args:
            url: without a slash at the end.
            cache: where logs are kept; by default the machine's.
            attempts: how often a broken connection is tried, each time after a longer pause.
        """
        self.url = url
        self.cache = LogCache.of_machine() if cache is None else cache
        self.folder = self.cache.folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._attempts = attempts

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of a small file, fetched each time.

        Raises:
            MissingObject: if it is not there.
            DataError: if it is larger than `max_bytes` or cannot be fetched.
        """

        def read() -> bytes:
            with self._open(name) as file:
                return b"".join(_parts(file, max_bytes, f"{self.url}/{name}"))

        return self._tried(name, read)

    def begin(self, name: str, parse: Callable[[BinaryIO], _T]) -> _T:
        """What `parse` finds at the beginning of a large file; nothing is kept.

        Raises:
            MissingObject: if it is not there.
            DataError: if it cannot be fetched, or `parse` refuses what arrived each time.
        """

        def read() -> _T:
            with self._open(name) as file:
                try:
                    return parse(file)
                except DataError as error:
                    raise _BrokenOffError(f"arrived damaged: {error}") from None

        return self._tried(name, read)

    def open(self, name: str, kept: str, size: int, open_file: Callable[[Path], _T], check: Callable[[_T], None]) -> _T:
        """A file as `open_file` opens it on this machine, fetched if it is not there.

        Args:
            name: under the URL.
            kept: what it is called here, without an ending; another content needs another name.
            size: its bytes.
            open_file: opens the file; refuses with a `DataError` what is not the file that was meant.
            check: compares all that was opened with its checksums; called once, when it was fetched.

        Raises:
            MissingObject: if it is not there.
            DataError: if it cannot be fetched, arrives damaged each time, or is not the file that was meant.
        """
        path = self.folder / f"{kept}.{size}{KEPT_SUFFIX}"

        def fetch(file: BinaryIO, partial: Path) -> None:
            file.seek(0)
            file.truncate()
            with self._open(name) as source:
                for part in _parts(source, size, f"{self.url}/{name}"):
                    file.write(part)
            file.flush()
            if file.tell() != size:
                raise _BrokenOffError(f"{file.tell()} of {size} bytes arrived")
            try:
                check(open_file(partial))
            except DataError as error:
                raise _BrokenOffError(f"arrived damaged: {str(error).replace(str(partial), name)}") from None

        def fill(partial: Path) -> None:
            with partial.open("wb") as file:
                self._tried(name, lambda: fetch(file, partial))

        # Another process may drop it before it is open, and a disk may have spoilt it: once more.
        for attempt in range(3):
            self.cache.get(path, size, fill)
            try:
                return open_file(path)
            except DataError:
                if attempt == 2:
                    raise
                path.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The object as a file to read from beginning to end."""
        try:
            import fsspec
        except ImportError:
            raise ConfigError(
                f"{self.url}: reading from elsewhere needs fsspec. Install it: pip install 'picture3d[remote]'"
            ) from None
        options: dict[str, Any] = {}
        block = 1 << 23
        try:
            if self.url.startswith(("http://", "https://")):
                import aiohttp

                # A whole log may take longer than the five minutes it would have; a silent connection is given up.
                options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, connect=30, sock_read=60)}
                block = 0  # one stream, whether the server knows ranges or not
            files, path = fsspec.url_to_fs(f"{self.url}/{name}", **options)
        except ImportError as error:
            raise ConfigError(f"{self.url}: a package is missing to read from there ({error}). Install it with pip.") from None
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}. Name a folder, or a URL that fsspec knows.") from None
        return files.open(path, "rb", block_size=block)

    def _tried(self, name: str, action: Callable[[], Any]) -> Any:
        where = f"{self.url}/{name}"
        last: BaseException | None = None
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                return action()
            except (DataError, ConfigError):
                raise
            except FileNotFoundError as error:
                # Over HTTP fsspec calls every failed question a missing file, and gives what happened as its cause.
                cause = error.__cause__
                status = getattr(cause, "status", None)
                if status in (401, 403):
                    raise DataError(f"{where}: may not be read (HTTP {status}). Check your credentials for it.") from None
                if cause is None or not type(cause).__module__.startswith("aiohttp") or status in (404, 410):
                    told = f"{where}: is not there. Check the URL, and that all of the folder was uploaded."
                    raise MissingObject(told) from None
                last = cause
            except PermissionError as error:
                raise DataError(f"{where}: may not be read ({error}). Check your credentials for it.") from None
            except Exception as error:  # each file system has errors of its own; what they are made of is all the same here
                if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                    raise  # of this machine: told by the one who writes the file
                last = error
        told = str(last) or type(last).__name__
        raise DataError(f"{where}: could not be fetched in {self._attempts} attempts: {_line(told)}. Try again later.")


class MissingObject(DataError):  # noqa: N818  (it is what happened, and a DataError to everybody else)
    """There is nothing under a URL."""


class _BrokenOffError(Exception):
    """What arrived is not whole; the next attempt may do better."""


def _parts(file: BinaryIO, max_bytes: int, where: str) -> Iterator[bytes]:
    """The content, part by part, never more than `max_bytes`."""
    arrived = 0
    while part := file.read(_PART_BYTES):
        arrived += len(part)
        if arrived > max_bytes:
            raise DataError(f"{where}: more than the {max_bytes} bytes it may have. Upload the dataset anew, dataset.json too.")
        yield part


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _declared_size(path: Path) -> int:
    size = path.name.split(".")[-2]
    return int(size) if size.isdecimal() else 0


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock of the operating system on `path`; where files cannot be locked nothing is held."""
    handle = _handle(path)
    try:
        if handle is not None:
            with suppress(OSError):
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock on `path`."""
    handle = _handle(path)
    if handle is None:
        return False
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _handle(path: Path) -> int | None:
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space, or name another folder for fetched logs "
            "with PICTURE3D_CACHE."
        ) from error
