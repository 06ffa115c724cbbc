"""Metrics replayed into TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from picture3d.commands.train import tensorboard
from picture3d.errors import ConfigError

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_a_missing_tensorboard_names_the_extra(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"picture3d\[track\]"):
        tensorboard(tmp_path, None)


@pytest.mark.skipif(not INSTALLED, reason="tensorboard is not installed (extra: track)")
def test_metrics_become_event_files(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1, "losses": {"total": 2.0}}\n')
    tensorboard(tmp_path, None)
    assert list((tmp_path / "tensorboard").glob("events*"))
