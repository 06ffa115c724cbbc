from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from picture3d.errors import CheckpointError, DataError
from picture3d.files import PARTIAL_SUFFIX
from picture3d.training.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from picture3d.training.runlog import RunFolder

TENSORS = {
    "a": torch.tensor([1.5, float("nan"), -0.0]),
    "b.half": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,  # not contiguous
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False]),
}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def test_tensors_and_description_come_back_to_the_last_bit(tmp_path: Path):
    meta = {"step": 3, "third": 1 / 3, "config": {"name": "é"}}
    save_checkpoint(tmp_path / "deep" / "x.safetensors", TENSORS, meta)
    read = load_checkpoint(tmp_path / "deep" / "x.safetensors")
    assert read.meta == meta
    assert read.tensors.keys() == TENSORS.keys()
    assert all(same_bytes(read.tensors[name], TENSORS[name]) for name in TENSORS)


def test_tied_weights_are_stored_under_both_names(tmp_path: Path):
    shared = torch.arange(3.0)
    save_checkpoint(tmp_path / "x.safetensors", {"a": shared, "b": shared}, {})
    assert same_bytes(load_checkpoint(tmp_path / "x.safetensors").tensors["b"], shared)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 50, -1, -13])
def test_a_torn_file_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.zeros(100)}, {})
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(path)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})
    before = path.read_bytes()

    def disk_full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("picture3d.training.checkpoint.save_file", disk_full)
    with pytest.raises(DataError, match=r"x\.safetensors: cannot be written \(No space left on device\)"):
        save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(DataError, match="cannot be written"):
        RunFolder(tmp_path / "absent").append_metrics({"step": 1})


def test_a_file_without_our_description_is_read(tmp_path: Path):
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    read = load_checkpoint(tmp_path / "foreign.safetensors")
    assert read.meta == {}
    assert read.tensors["w"].tolist() == [1, 1]


def test_a_pickle_is_not_opened(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        load_checkpoint(tmp_path / "x.pt")


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_are_told(tmp_path: Path):
    for step in (5, 10, 100_000_000):
        save_checkpoint(checkpoint_path(tmp_path, step), {"a": torch.ones(4)}, {"step": step})
    (tmp_path / "step_notes.txt").write_text("not a checkpoint")
    assert checkpoint_steps(tmp_path) == [5, 10, 100_000_000]
    newest = checkpoint_path(tmp_path, 100_000_000)
    newest.write_bytes(newest.read_bytes()[:-1])
    told: list[str] = []
    assert latest_checkpoint(tmp_path, log=told.append) == checkpoint_path(tmp_path, 10)
    assert len(told) == 1
    assert newest.name in told[0]
    assert latest_checkpoint(tmp_path / "absent") is None


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(checkpoint_path(tmp_path, step), {"a": torch.ones(1)}, {})
    half = tmp_path / f"{checkpoint_path(tmp_path, 9).name}{PARTIAL_SUFFIX}"
    half.write_bytes(b"left by a process that was killed while it wrote")
    prune_checkpoints(tmp_path, 2, best=1)
    assert checkpoint_steps(tmp_path) == [1, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3
    prune_checkpoints(tmp_path, 2, best=4)
    assert checkpoint_steps(tmp_path) == [3, 4]


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def test_a_whole_transfer_below_a_prefix_says_so():
    source, target = network(), network()
    tensors = {f"encoder.{name}": value for name, value in source.state_dict().items()} | {"head.weight": torch.ones(2)}
    report = load_into(target, tensors, prefix="encoder.")
    assert report.complete
    assert report.summary() == "7 of 7 tensors loaded"
    assert all(same_bytes(target.state_dict()[name], value) for name, value in source.state_dict().items())


def test_a_partial_transfer_is_refused_and_leaves_the_module_alone():
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    tensors = {**network(5).state_dict(), "1.extra": torch.ones(1)}
    del tensors["0.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(0\.bias\).*1 unexpected \(1\.extra\).*5 of the wrong shape"):
        load_into(target, tensors)
    assert all(same_bytes(target.state_dict()[name], value) for name, value in before.items())


def test_a_partial_transfer_that_was_asked_for_is_reported():
    target = network()
    report = load_into(target, {"0.weight": torch.full((4, 3), 2.0), "0.bias": torch.ones(9)}, allow_partial=True)
    assert report.matched == ("0.weight",)
    assert report.wrong_shape == ("0.bias",)
    assert len(report.missing) == 5
    assert target.state_dict()["0.weight"].unique().tolist() == [2.0]


def test_a_void_transfer_is_never_accepted():
    with pytest.raises(CheckpointError, match="nothing in this checkpoint fits"):
        load_into(network(), {"other": torch.ones(1)}, allow_partial=True)
    with pytest.raises(CheckpointError, match=r"below 'encoder\.'"):
        load_into(network(), network().state_dict(), prefix="encoder.")


def test_weights_of_a_run_folder_are_the_finished_ones_or_else_the_newest(tmp_path: Path):
    save_checkpoint(
        checkpoint_path(tmp_path / "checkpoints", 3), {"model.w": torch.zeros(1), "optimizer.step.w": torch.ones(1)}, {}
    )
    assert {n: t.tolist() for n, t in load_weights(tmp_path).tensors.items()} == {"w": [0.0]}
    save_checkpoint(tmp_path / "model.safetensors", {"model.w": torch.ones(1)}, {})
    assert load_weights(tmp_path).tensors["w"].tolist() == [1.0]
    with pytest.raises(CheckpointError, match="Wait until training has written one"):
        load_weights(tmp_path / "checkpoints")
