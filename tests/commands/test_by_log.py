from __future__ import annotations

import numpy as np

from picture3d.commands.by_log import Arrays, Frames, log_by_log
from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.samples import DataConfig
from picture3d.training.distributed import Team
from tests.datasets.made_frames import made_frame, write_made_dataset


def names_of(frames: Frames) -> Arrays:
    return {"names": np.array([name for _, batch in frames for name in batch.frame_names])}


def first_of(frames: Frames) -> Arrays:
    return {"name": np.array(str(next(frames)[0].index))}


def test_every_log_is_looked_at_apart_and_the_batches_hold_all_frames_again_afterwards(tmp_path):
    root = write_made_dataset(tmp_path, {log: [made_frame(log, i) for i in range(3)] for log in "ab"})
    batches = FrameBatches(DataConfig.from_tree({"root": str(root), "augment": {}}), batch_size=1, seed=0, train=False)
    every = batches.keys
    for _ in range(2):  # the second time as the first, also after a log that was left half way
        parts = log_by_log(batches, Team(), "look", names_of)
        assert [part["names"].tolist() for part in parts] == [[f"{log}/{i}" for i in range(3)] for log in "ab"]
        assert [str(part["name"]) for part in log_by_log(batches, Team(), "look", first_of)] == ["0", "0"]
        assert batches.keys == every
