"""Coverage-guided fuzzing of one reader of files, for as long as you like. Needs `pip install atheris`.

    python tools/fuzz.py pcd -max_total_time=600
    python tools/fuzz.py --list

What follows the name are options of libFuzzer. A file that makes a reader raise anything but the package's own errors, or ask
for more than 1 GB, ends the run and is kept in the current folder as `crash-...` or `oom-...`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # no dependency of the project: type checkers need not find it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["picture3d"]):
    from picture3d.errors import Picture3dError
    from tests.fuzzing.readers import READERS


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] not in READERS:
        print(__doc__)
        print("readers:", ", ".join(f'"{name}"' for name in READERS))
        raise SystemExit(0 if words == ["--list"] else 2)
    reader = READERS[words[0]]
    with tempfile.TemporaryDirectory() as folder:
        seeds, path = Path(folder) / "seeds", Path(folder) / f"file{reader.suffix}"
        seeds.mkdir()
        for number, data in enumerate(reader.files):
            (seeds / str(number)).write_bytes(data)

        def one(data: bytes) -> None:
            path.write_bytes(data)
            with contextlib.suppress(Picture3dError):
                reader.read(path)

        atheris.Setup(["fuzz", "-rss_limit_mb=1024", *words[1:], str(seeds)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
