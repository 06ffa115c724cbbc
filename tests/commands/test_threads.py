"""How many threads compute: as many as a command is told, from its start to its end; in processes that help it, one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.samples import DataConfig
from picture3d.recipes.catalogue import pretraining_recipe, tiny
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.workers import THREAD_VARIABLES, worker_pool
from tests import team_work
from tests.command_line import do


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = team_work.made_runs(tmp_path_factory.mktemp("threads"))
    plain = tiny(pretraining_recipe("town-picture", root / "prepared"))
    changes = ["targets.mode=none", "mask.kind=random", "loss.features_weight=0", "data.split=val"]
    plain.with_overrides(changes).save(root / "pretrain.json")
    return root


@pytest.mark.parametrize(
    "words",
    [
        "targets {}/prepared --teacher handcrafted --threads 3",
        "pretrain --config {}/pretrain.json --out {}/a --threads 3",
        "pretrain --config {}/pretrain.json --out {}/b --set training.threads=3",
        "pretrain --config {}/pretrain.json --out {}/c --threads 3 --set training.threads=5",
        "evaluate {}/segment --threads 3",
        "evaluate {}/town-detection --threads 3",
        "predict {}/segment --out {}/predicted.json --threads 3",
    ],
)
def test_a_command_sets_its_threads_once(runs, monkeypatch, words):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    do(*words.replace("{}", str(runs)).split())
    assert chosen == [3]


class _Threads:
    """A teacher that says how many threads it was asked in."""

    def targets(self, frame: Frame) -> FrameTargets:
        features = np.full((1, 2), torch.get_num_threads(), np.float16)
        return FrameTargets(features, np.zeros(1, np.uint8), np.zeros(len(frame.points), np.int64))


def test_a_process_that_loads_computes_with_one_thread(runs):
    config = DataConfig(root=runs / "prepared", split="val", labels=False)
    batches = FrameBatches(config, batch_size=2, seed=0, workers=1, targets=_Threads())
    batch = next(iter(batches.epoch(0)))
    assert batch.cell_features is not None
    assert (batch.cell_features == 1).all()


def test_a_process_that_shares_work_computes_with_one_thread_and_this_one_as_before(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == before
