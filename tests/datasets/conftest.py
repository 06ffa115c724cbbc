"""A folder of the test served as a remote root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datasets.object_store import ObjectStore, object_store


@pytest.fixture
def store(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """What the module's fixture `local` holds, over HTTP, with a cache of its own and no waiting between attempts."""
    monkeypatch.setenv("PICTURE3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("picture3d.formats.remote._FIRST_WAIT_S", 0.0)
    with object_store(local) as found:
        yield found
