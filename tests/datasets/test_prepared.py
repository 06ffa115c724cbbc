from __future__ import annotations

import json
import pickle

import pytest

from picture3d.datasets.prepared import (
    FrameKey,
    LogHeader,
    PreparedDataset,
    finished_log,
    log_path,
    open_for_writing,
    write_dataset,
)
from picture3d.errors import DataError
from tests.datasets.made_frames import made_frame, write_log, write_made_dataset


def frames(log: str, count: int = 3, **changes):
    return [made_frame(log, index, points=5, **changes) for index in range(count)]


def test_a_dataset_knows_its_splits_logs_and_keyframes_without_opening_a_log(tmp_path, monkeypatch):
    logs = {"b": frames("b"), "a": frames("a", 2), "c": frames("c", 1)}
    write_made_dataset(tmp_path, logs, splits={"train": ["b", "a"], "val": ["c"]})
    for log in logs:
        log_path(tmp_path, log).rename(tmp_path / f"{log}.away")
    dataset = PreparedDataset(tmp_path)
    assert dataset.logs() == ("a", "b", "c")
    assert dataset.logs("train") == ("a", "b")
    assert [str(key) for key in dataset.keyframes("train")] == ["a/0", "a/1", "b/0", "b/1", "b/2"]
    assert dataset.label_set is not None
    assert dataset.label_set.name == "nuscenes-32"
    with pytest.raises(DataError, match=r"no such file\. Run the `prepare` command"):
        dataset.frame(FrameKey("a", 0))


def test_the_fingerprint_changes_with_the_data_and_not_with_the_folder(tmp_path):
    def fingerprint(name: str, **changes) -> str:
        write_made_dataset(tmp_path / name, {"a": frames("a"), "b": frames("b", **changes)})
        return PreparedDataset(tmp_path / name).fingerprint("train")

    first = fingerprint("x")
    assert fingerprint("y") == first
    assert fingerprint("z", labels=None) != first


def test_few_logs_are_open_at_a_time_and_each_is_opened_once(tmp_path):
    write_made_dataset(tmp_path, {f"l{i}": frames(f"l{i}", 1) for i in range(5)})
    dataset = PreparedDataset(tmp_path, open_logs=2)
    first = dataset.reader("l0")
    assert dataset.reader("l0") is first
    for i in range(1, 5):
        dataset.reader(f"l{i}")
    assert dataset.reader("l0") is not first
    assert first.frame(0).log == "l0"  # who holds a reader may go on reading


def test_a_dataset_survives_being_sent_to_another_process(tmp_path):
    write_made_dataset(tmp_path, {"a": frames("a")})
    dataset = PreparedDataset(tmp_path)
    dataset.reader("a")
    assert pickle.loads(pickle.dumps(dataset)).frame(FrameKey("a", 1)).index == 1


def test_a_folder_that_is_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="picture3d prepare"):
        PreparedDataset(tmp_path)


def test_a_dataset_in_the_making_counts_as_unfinished(tmp_path):
    write_made_dataset(tmp_path, {"a": frames("a")})
    open_for_writing(tmp_path)
    with pytest.raises(DataError, match="did not finish"):
        PreparedDataset(tmp_path)


def test_somebody_elses_dataset_json_is_not_touched(tmp_path):
    (tmp_path / "dataset.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match="belongs to something else"):
        open_for_writing(tmp_path)
    assert (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("key", ["format", "version", "name", "label_set", "splits", "logs"])
@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, 7])
def test_a_garbled_dataset_json_gives_our_own_error_or_a_dataset(tmp_path, key, value):
    write_made_dataset(tmp_path, {"a": frames("a")})
    path = tmp_path / "dataset.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, key: value}))
    if (key, value) in [("label_set", None), ("splits", {}), ("name", "x"), ("name", 7)] or key == "name":
        PreparedDataset(tmp_path)
        return
    with pytest.raises(DataError):
        PreparedDataset(tmp_path)


def test_a_log_swapped_for_another_is_noticed(tmp_path):
    write_made_dataset(tmp_path, {"a": frames("a")})
    write_log(tmp_path, frames("a", 2), log="a")
    with pytest.raises(DataError, match=r"not the file that dataset\.json was written for"):
        PreparedDataset(tmp_path).reader("a")


def test_a_log_name_that_leaves_the_folder_is_refused(tmp_path):
    write_made_dataset(tmp_path, {"a": frames("a")})
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"a"', '"../a"'))
    with pytest.raises(DataError, match="cannot name a log"):
        PreparedDataset(tmp_path)


def test_a_log_in_two_splits_is_refused(tmp_path):
    with pytest.raises(DataError, match="in split 'train' and in split 'val'"):
        write_made_dataset(tmp_path, {"a": frames("a")}, splits={"train": ["a"], "val": ["a"]})


def test_files_of_earlier_preparations_are_cleared_away(tmp_path):
    write_made_dataset(tmp_path, {"a": frames("a"), "b": frames("b")})
    (tmp_path / "logs" / "c.p3d.partial").write_bytes(b"left over")
    summary = PreparedDataset(tmp_path).summary("a")
    write_dataset(tmp_path, name="made", label_set_name=None, splits={"train": ["a"]}, logs={"a": summary})
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["a.p3d"]


def test_a_finished_log_is_kept_only_if_it_was_made_in_the_same_way(tmp_path):
    header = LogHeader("a", "made", "nuscenes-32", {"sweeps": 9, "files": [1, 2]})
    assert finished_log(tmp_path, header) is None
    path = write_log(tmp_path, frames("a"), log="a", source={"sweeps": 9, "files": [1, 2]})
    summary = finished_log(tmp_path, header)
    assert summary is not None
    assert summary.frames == 3
    assert finished_log(tmp_path, LogHeader("a", "made", "nuscenes-32", {"sweeps": 4, "files": [1, 2]})) is None
    assert finished_log(tmp_path, LogHeader("a", "made", None, header.source)) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert finished_log(tmp_path, header) is None
