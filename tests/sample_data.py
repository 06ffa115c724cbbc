"""Where reference numbers and real sample sweeps are found. Tests that need them skip, by name, where they are absent.

`PICTURE3D_GOLDEN` and `PICTURE3D_DATA` name the folders; the defaults are `../shared/golden` and `../shared/data`
beside the checkout. Pickled samples are opened here only, by an unpickler restricted to numpy.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

_CHECKOUT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, _CHECKOUT.parent / "shared" / default))


def golden_dir() -> Path:
    """The folder of reference numbers, whether or not it exists."""
    return _folder("PICTURE3D_GOLDEN", "golden")


def golden_files(group: str, prefix: str) -> list[Any]:
    """Pytest parameters: every `group/prefix*.npz` found, or one that skips and names what is absent."""
    found = sorted((golden_dir() / group).glob(f"{prefix}*.npz"))
    if found:
        return [pytest.param(path, id=path.stem) for path in found]
    return [pytest.param(None, id=prefix, marks=pytest.mark.skip(reason=f"no {group}/{prefix}*.npz under {golden_dir()}"))]


def sample_path(relative: str) -> Path:
    """A file or folder of the sample data; skips the calling test, by name, where it is absent."""
    path = _folder("PICTURE3D_DATA", "data") / relative
    if not path.exists():
        pytest.skip(f"sample data {relative} is absent (looked in {path.parent})")
    return path


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in sample data")


def load_numpy_pickle(path: Path) -> Any:
    """The content of a pickled sample file that holds only numpy values, strings and containers."""
    data = path.read_bytes()
    if path.suffix == ".npy":  # an object array: skip the npy header, the payload is a pickle
        header_length = int.from_bytes(data[8:10], "little")
        data = data[10 + header_length :]
    return _NumpyUnpickler(io.BytesIO(data)).load()
