"""A server of files over HTTP on this machine that can be told to fail. A path-style S3 client finds a bucket in each folder.

Of the S3 interface it knows what reading needs: HeadObject, GetObject with a range, the answer for an object that is not
there. It asks for no signature.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class ObjectStore(ThreadingHTTPServer):
    """Counts what was fetched; `trouble` is taken from the front, one entry per GET: cut, 503, garble, slow, "" for none."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.fetched: list[str] = []
        self.trouble: list[str] = []
        self.knows_ranges = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def logs(self) -> list[str]:
        """Names of the logs that were fetched, in order."""
        return [path.split("/")[-1].removesuffix(".p3d") for path in self.fetched if path.endswith(".p3d")]


class _Handler(SimpleHTTPRequestHandler):
    def do_HEAD(self) -> None:
        if isinstance(self.server, ObjectStore) and "forbidden" in self.path:
            self.send_error(403)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        store = self.server
        assert isinstance(store, ObjectStore)
        store.fetched.append(self.path)
        trouble = store.trouble.pop(0) if store.trouble else ""
        if trouble == "503" or "forbidden" in self.path:
            self.send_error(503 if trouble else 403)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404, explain="<Error><Code>NoSuchKey</Code></Error>")
            return
        content = bytearray(path.read_bytes())
        if trouble == "garble":
            content[len(content) // 3] ^= 255
        start, end = _range(self.headers.get("Range", ""), len(content)) if store.knows_ranges else (0, len(content))
        self.send_response(200 if end - start == len(content) else 206)
        if end - start < len(content):
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if trouble == "slow":
            time.sleep(0.3)
        self.wfile.write(content[: len(content) // 2] if trouble == "cut" else content)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _range(header: str, size: int) -> tuple[int, int]:
    """First byte and the one behind the last, of ``bytes=first-last``."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    return (int(first), min(int(last) + 1, size) if last else size) if first.isdecimal() else (0, size)


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(folder)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        thread.join()
        store.server_close()
