from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from picture3d.commands.build import build_targets
from picture3d.datasets.check import check_prepared
from picture3d.datasets.class_balance import class_counts
from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.prepared import FrameKey, PreparedDataset, open_for_writing
from picture3d.datasets.samples import DataConfig
from picture3d.datasets.sensor_intensity import measure_intensity, write_table
from picture3d.errors import ConfigError, DataError
from picture3d.formats.remote import LogCache, MissingObject, RemoteFolder, remote_url
from picture3d.recipes.configs import TargetsConfig
from tests.datasets.made_frames import assert_same, made_frame, write_made_dataset
from tests.datasets.object_store import ObjectStore, object_store


@pytest.fixture
def local(tmp_path):
    logs = {log: [made_frame(log, i, points=200, seed=ord(log)) for i in range(4)] for log in "abcd"}
    return write_made_dataset(tmp_path / "made", logs)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in (tmp_path / "cache").glob("*/*.p3d"))


@pytest.mark.parametrize(
    ("root", "url"),
    [
        ("s3://bucket/frames/", "s3://bucket/frames"),
        (Path("s3://bucket/frames"), "s3://bucket/frames"),
        (Path("http://127.0.0.1:80/x y"), "http://127.0.0.1:80/x y"),
        ("memory://x", "memory://x"),
        (Path("file:///data/x"), "file:///data/x"),
        (Path("/data/s3:/x"), None),
        (Path("prepared"), None),
        ("C:/data", None),
        ("a:b", None),
    ],
)
def test_a_url_is_told_from_a_folder_even_as_a_path(root, url):
    assert remote_url(root) == url


def test_batches_from_a_server_are_those_of_the_folder(local, store):
    settings: dict[str, Any] = {"sweeps": 2, "augment": {}, "shuffle_window": 2}
    here = FrameBatches(DataConfig.from_tree({"root": str(local), **settings}), batch_size=3, seed=1)
    there = FrameBatches(DataConfig.from_tree({"root": store.url, **settings}), batch_size=3, seed=1)
    for epoch in range(2):
        for one, two in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
            assert_same(one, two)
    assert sorted(store.logs()) == ["a", "b", "c", "d"], "each log is fetched once"
    assert here.identity[0]["logs_crc32c"] == there.identity[0]["logs_crc32c"]


def test_workers_share_what_was_fetched(local, store):
    tree: dict[str, Any] = {"sweeps": 2, "augment": {}}
    here = FrameBatches(DataConfig.from_tree({"root": str(local), **tree}), batch_size=2, seed=1)
    there = FrameBatches(DataConfig.from_tree({"root": store.url, **tree}), batch_size=2, seed=1, workers=2)
    for one, two in zip(here.epoch(0), there.epoch(0), strict=True):
        assert_same(one, two)
    assert sorted(store.logs()) == ["a", "b", "c", "d"]


def test_only_the_logs_that_are_read_are_fetched(store, tmp_path):
    dataset = PreparedDataset(Path(store.url))
    assert len(dataset.keyframes()) == 16
    assert store.logs() == []
    dataset.frame(FrameKey("c", 1))
    dataset.frame(FrameKey("c", 3))
    assert store.logs() == ["c"]
    PreparedDataset(Path(store.url)).frame(FrameKey("c", 0))
    assert store.logs() == ["c"], "another start finds it in the cache"
    assert cached(tmp_path) == ["c"]


def test_any_file_system_of_fsspec_will_do(local, store):
    memory = fsspec.filesystem("memory")
    for path in [local / "dataset.json", *(local / "logs").iterdir()]:
        memory.pipe(f"/frames/{path.relative_to(local)}", path.read_bytes())
    try:
        dataset = PreparedDataset(Path("memory://frames"))
        key = FrameKey("b", 2)
        assert np.array_equal(dataset.frame(key).points.xyz, PreparedDataset(local).frame(key).points.xyz)
    finally:
        memory.rm("/frames", recursive=True)


@pytest.fixture
def bucket(store, monkeypatch, local):
    """The same files as objects of a bucket, ``s3://frames``, for the S3 client that users have."""
    (local / "frames").mkdir()
    for name in ("dataset.json", "logs"):
        (local / "frames" / name).symlink_to(local / name)
    store.knows_ranges = True
    for name, value in {
        "ENDPOINT_URL": store.url,
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "y",
        "DEFAULT_REGION": "here",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield store
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_an_object_store_is_read_through_its_own_client(bucket, local, tmp_path):
    there = FrameBatches(DataConfig(root=Path("s3://frames"), shuffle_window=1), batch_size=3, seed=1)
    here = FrameBatches(DataConfig(root=local, shuffle_window=1), batch_size=3, seed=1)
    for one, two in zip(here.epoch(0), there.epoch(0), strict=True):
        assert_same(one, two)
    assert set(bucket.logs()) == {"a", "b", "c", "d"}
    assert cached(tmp_path) == ["a", "b", "c", "d"]


def test_an_object_that_is_not_in_the_store_is_said_at_once(bucket, local):
    with pytest.raises(MissingObject, match=r"s3://frames/none/dataset\.json: is not there"):
        PreparedDataset(Path("s3://frames/none"))
    dataset = PreparedDataset(Path("s3://frames"))
    (local / "logs" / "b.p3d").unlink()
    with pytest.raises(MissingObject, match=r"s3://frames/logs/b\.p3d: is not there"):
        dataset.frame(FrameKey("b", 0))


def test_a_transfer_from_an_object_store_that_is_spoilt_or_cut_is_repeated(bucket, local):
    dataset = PreparedDataset(Path("s3://frames"))
    bucket.trouble = ["garble", "cut"]
    got = dataset.frame(FrameKey("a", 0)).points.xyz
    assert np.array_equal(got, PreparedDataset(local).frame(FrameKey("a", 0)).points.xyz)
    assert bucket.logs().count("a") >= 3


def test_the_cache_keeps_its_limit_and_drops_what_was_not_used_for_longest(local, store, tmp_path, monkeypatch):
    size = max(path.stat().st_size for path in (local / "logs").iterdir())
    monkeypatch.setenv("PICTURE3D_CACHE_GB", str(2.5 * size / 1e9))
    expected = {"a": ["a"], "b": ["a", "b"], "c": ["b", "c"], "b again": ["b", "c"], "d": ["b", "d"]}
    time_ns = 10**18
    for step, left in expected.items():
        PreparedDataset(Path(store.url)).frame(FrameKey(step[0], 0))
        assert cached(tmp_path) == left
        for path in (tmp_path / "cache").glob(f"*/{step[0]}.*.p3d"):  # clocks of file systems are coarse
            os.utime(path, ns=(time_ns, time_ns))
        time_ns += 10**9
    assert store.logs() == ["a", "b", "c", "d"]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= 2.5 * size


def test_a_log_that_is_dropped_while_it_is_open_is_read_on(local, store, tmp_path, monkeypatch):
    size = max(path.stat().st_size for path in (local / "logs").iterdir())
    monkeypatch.setenv("PICTURE3D_CACHE_GB", str(1.5 * size / 1e9))
    dataset = PreparedDataset(Path(store.url))
    for key in [FrameKey("a", 0), FrameKey("b", 0), FrameKey("a", 1), FrameKey("b", 1)]:
        assert np.array_equal(dataset.frame(key).points.xyz, PreparedDataset(local).frame(key).points.xyz)
    assert cached(tmp_path) == ["b"]


def test_a_window_fetches_each_log_once_an_epoch_where_a_shuffle_of_all_fetches_again_and_again(tmp_path, monkeypatch):
    logs = {log: [made_frame(log, i, points=200, seed=ord(log)) for i in range(6)] for log in "abcdefgh"}
    local = write_made_dataset(tmp_path / "many", logs)
    size = max(path.stat().st_size for path in (local / "logs").iterdir())
    monkeypatch.setattr("picture3d.datasets.prepared._OPEN_REMOTE_LOGS", 1)
    fetched = {}
    for window in (2, None):
        monkeypatch.setenv("PICTURE3D_CACHE", str(tmp_path / f"cache-{window}"))
        monkeypatch.setenv("PICTURE3D_CACHE_GB", str(3.5 * size / 1e9))  # three of eight logs
        with object_store(local) as store:
            config = DataConfig(root=Path(store.url), shuffle_window=window)
            assert len(list(FrameBatches(config, batch_size=4, seed=0).epoch(0))) == 12
            fetched[window] = store.logs()
    assert sorted(fetched[2]) == list("abcdefgh")
    assert len(fetched[None]) > 16


def test_a_log_larger_than_the_cache_is_refused_before_it_is_fetched(store, monkeypatch):
    monkeypatch.setenv("PICTURE3D_CACHE_GB", "1e-6")
    with pytest.raises(DataError, match=r"does not fit\. Set PICTURE3D_CACHE_GB higher"):
        PreparedDataset(Path(store.url)).frame(FrameKey("a", 0))
    assert store.logs() == []
    monkeypatch.setenv("PICTURE3D_CACHE_GB", "lots")
    with pytest.raises(ConfigError, match="PICTURE3D_CACHE_GB=lots"):
        PreparedDataset(Path(store.url))


@pytest.mark.parametrize("trouble", [["cut"], ["503", "503"], ["garble"], ["cut", "garble", "503"]])
def test_a_broken_connection_is_tried_again(store, local, tmp_path, trouble):
    dataset = PreparedDataset(Path(store.url))
    store.trouble = list(trouble)
    got = dataset.frame(FrameKey("a", 0))
    assert np.array_equal(got.points.xyz, PreparedDataset(local).frame(FrameKey("a", 0)).points.xyz)
    assert store.logs() == ["a"] * (len(trouble) + 1)
    assert cached(tmp_path) == ["a"]


@pytest.mark.parametrize(("trouble", "words"), [("cut", "not completed"), ("503", "503"), ("garble", "arrived damaged")])
def test_a_connection_that_stays_broken_is_an_error_of_one_line(store, tmp_path, trouble, words):
    dataset = PreparedDataset(Path(store.url))
    store.trouble = [trouble] * 99
    with pytest.raises(DataError, match=rf"/logs/a\.p3d: could not be fetched in 4 attempts.*{words}") as caught:
        dataset.frame(FrameKey("a", 0))
    assert "\n" not in str(caught.value)
    assert store.logs() == ["a"] * 4
    assert cached(tmp_path) == []
    assert not list((tmp_path / "cache").glob("*/*.partial"))


def test_a_server_that_is_gone_is_an_error_in_words(local, store):
    dataset = PreparedDataset(Path(store.url))
    url = store.url
    store.shutdown()
    store.server_close()
    with pytest.raises(DataError, match="could not be fetched in 4 attempts"):
        dataset.frame(FrameKey("a", 0))
    with pytest.raises(DataError, match=r"dataset\.json: could not be fetched"):
        PreparedDataset(Path(url))


def test_what_is_not_there_is_said_at_once(store, local):
    with pytest.raises(MissingObject, match=r"/nowhere/dataset\.json: is not there"):
        PreparedDataset(Path(store.url) / "nowhere")
    assert len(store.fetched) == 1
    (local / "logs" / "b.p3d").unlink()
    with pytest.raises(DataError, match=r"/logs/b\.p3d: is not there. Check the URL"):
        PreparedDataset(Path(store.url)).frame(FrameKey("b", 0))


def test_what_may_not_be_read_is_said_at_once(store):
    with pytest.raises(DataError, match=r"may not be read \(HTTP 403\)"):
        PreparedDataset(Path(store.url) / "forbidden")


def test_a_log_of_another_preparation_is_refused(store, local):
    dataset = PreparedDataset(Path(store.url))
    (local / "logs" / "a.p3d").write_bytes((local / "logs" / "b.p3d").read_bytes())
    with pytest.raises(DataError, match=r"a\.p3d"):
        dataset.frame(FrameKey("a", 0))


def test_a_dataset_made_anew_is_not_read_from_the_old_cache(store, local):
    old = PreparedDataset(Path(store.url)).frame(FrameKey("a", 0)).points.xyz
    write_made_dataset(local, {"a": [made_frame("a", 0, points=200, seed=77)]})
    new = PreparedDataset(Path(store.url)).frame(FrameKey("a", 0)).points.xyz
    assert not np.array_equal(old, new)
    assert np.array_equal(new, made_frame("a", 0, points=200, seed=77).points.xyz)


def test_a_spoilt_file_of_the_cache_is_fetched_again(store, tmp_path):
    PreparedDataset(Path(store.url)).frame(FrameKey("a", 0))
    (path,) = (tmp_path / "cache").glob("*/a.*.p3d")
    content = bytearray(path.read_bytes())
    content[-20] ^= 255  # in the trailer
    path.write_bytes(content)
    PreparedDataset(Path(store.url)).frame(FrameKey("a", 0))
    assert store.logs() == ["a", "a"]


def test_what_a_killed_process_left_is_cleared(store, local, tmp_path, monkeypatch):
    size = max(path.stat().st_size for path in (local / "logs").iterdir())
    monkeypatch.setenv("PICTURE3D_CACHE_GB", str(1.5 * size / 1e9))
    folder = PreparedDataset(Path(store.url)).notes_folder
    folder.mkdir(parents=True)
    left = folder / f"d.00000000.{10 * size}.p3d.partial"
    left.write_bytes(b"half")
    PreparedDataset(Path(store.url)).frame(FrameKey("a", 0))
    assert not left.exists()
    assert cached(tmp_path) == ["a"]


_READ_ALL = """
import sys
from pathlib import Path
from picture3d.datasets.prepared import FrameKey, PreparedDataset
print("ready", flush=True)
sys.stdin.readline()
dataset = PreparedDataset(Path(sys.argv[1]))
print([float(dataset.frame(FrameKey(log, 1)).points.xyz.sum()) for log in "abcd"])
"""


def test_two_processes_share_the_cache_and_fetch_each_log_once(store, local):
    readers = [
        subprocess.Popen([sys.executable, "-c", _READ_ALL, store.url], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    store.trouble = ["", "", "slow"]  # dataset.json twice, then the first log while the other process wants it too
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    found = [reader.communicate(timeout=120)[0].strip() for reader in readers]
    dataset = PreparedDataset(local)
    assert found == [str([float(dataset.frame(FrameKey(log, 1)).points.xyz.sum()) for log in "abcd"])] * 2
    assert sorted(store.logs()) == ["a", "b", "c", "d"]


def test_what_lies_beside_the_frames_comes_too_or_is_refused_in_words(store, local, tmp_path):
    there = PreparedDataset(Path(store.url))
    with pytest.raises(DataError, match=r"intensity\.json: is not there"):
        there.intensity()
    write_table(local / "intensity.json", measure_intensity(PreparedDataset(local)))
    assert there.intensity().crc32c == PreparedDataset(local).intensity().crc32c
    counts = class_counts(there, there.keyframes(), DetectionClasses(("car",)))
    assert counts.shape == (16, 1)
    assert (there.notes_folder / "box_counts" / "min1.json").exists()
    with pytest.raises(DataError, match=r"holds no teacher features \(no teacher\.json\)"):
        build_targets(TargetsConfig(), Path(store.url), torch.device("cpu"))
    with pytest.raises(DataError, match="no occupancy labels are attached"):
        there.occupancy()
    with pytest.raises(DataError, match="Name a folder of this machine"):
        check_prepared(Path(store.url))
    with pytest.raises(DataError, match="nothing is written to a URL"):
        open_for_writing(Path(store.url))


def test_without_fsspec_a_url_is_an_error_of_one_line_and_a_folder_is_read(local, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"needs fsspec\. Install it: pip install 'picture3d\[remote\]'"):
        PreparedDataset(Path(store.url))
    assert len(PreparedDataset(local).keyframes()) == 16


def test_a_scheme_that_nobody_knows_or_whose_package_is_missing_is_said_in_words(tmp_path, monkeypatch):
    cache = LogCache(tmp_path / "cache", 1 << 30)
    with pytest.raises(ConfigError, match=r"nosuch://x: .*nosuch"):
        RemoteFolder("nosuch://x", cache).read("dataset.json", max_bytes=10)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match="a package is missing to read from there"):
        RemoteFolder("http://127.0.0.1:9/x", cache).read("dataset.json", max_bytes=10)


def test_more_bytes_than_expected_are_not_taken(store: ObjectStore, local):
    (local / "big").write_bytes(bytes(100))
    with pytest.raises(DataError, match="more than the 99 bytes"):
        RemoteFolder(store.url).read("big", max_bytes=99)
    assert RemoteFolder(store.url).read("big", max_bytes=100) == bytes(100)


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PICTURE3D_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="name another folder for fetched logs with PICTURE3D_CACHE"):
        PreparedDataset(Path(store.url)).frame(FrameKey("a", 0))


def test_a_folder_of_this_machine_needs_no_cache(local, tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURE3D_CACHE", str(tmp_path / "cache"))
    PreparedDataset(local).frame(FrameKey("a", 0))
    assert not (tmp_path / "cache").exists()
