"""What lies beside prepared frames, targets, occupancy labels and objects, read from a server: as from the folder itself."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picture3d.commands.build import build_targets
from picture3d.datasets.loading import FrameBatches
from picture3d.datasets.nuscenes import prepare_nuscenes
from picture3d.datasets.object_building import build_object_database
from picture3d.datasets.object_database import ObjectDatabase
from picture3d.datasets.occupancy_store import OccupancyStore, has_occupancy
from picture3d.datasets.openoccupancy import attach_occupancy
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig
from picture3d.errors import DataError
from picture3d.formats.remote import MissingObject
from picture3d.recipes.configs import TargetsConfig
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.teachers.store import FeatureStore, write_file_list
from picture3d.teachers.targets import compute_targets
from tests.datasets.made_frames import assert_same
from tests.datasets.object_scenes import random_frame, write_scenes
from tests.datasets.object_store import ObjectStore
from tests.datasets.occupancy_labels import write_labels
from tests.datasets.raw_nuscenes import RawWorld
from tests.teachers.made_teachers import FourierTeacher

LOGS = ["scene-0001", "scene-0002"]
OBJECTS = "objects/train-1sweeps.objects"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two logs with everything attached."""
    folder = tmp_path_factory.mktemp("beside")
    world = RawWorld(folder / "raw", keyframes=3, between=0, points=400)
    world.write()
    write_labels(world, folder)
    prepare_nuscenes(world.root, folder / "prepared")
    dataset = PreparedDataset(folder / "prepared")
    attach_occupancy(folder, dataset)
    compute_targets(dataset, FourierTeacher())
    return folder / "prepared"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Two logs with an object database."""
    rng = np.random.default_rng(0)
    logs = {log: [random_frame(i, rng, log=log, categories=("vehicle.car",)) for i in range(4)] for log in LOGS}
    root = write_scenes(tmp_path_factory.mktemp("library"), logs)
    build_object_database(root)
    return root


@pytest.fixture
def local(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "prepared"))


@pytest.fixture
def objects(library, local) -> Path:
    """The other logs with their objects, on the same server."""
    return Path(shutil.copytree(library, local / "library"))


def fetched(store: ObjectStore, ending: str) -> list[str]:
    return [path.split("/")[-1] for path in store.fetched if path.endswith(ending)]


def targets_of(source: FeatureStore | Path, frame: Frame) -> FrameTargets:
    store = source if isinstance(source, FeatureStore) else FeatureStore(source / "targets" / "fourier")
    found = store.targets(frame)
    assert found is not None
    return found


def batches(root: Path | str, **changes: Any) -> FrameBatches:
    """Batches with the targets, the occupancy labels and the boxes of every keyframe."""
    tree = {"root": str(root), "split": None, "occupancy": True, "box_classes": ("car",)}
    targets = build_targets(TargetsConfig(mode="stored", teacher="fourier"), Path(root), torch.device("cpu"))
    return FrameBatches(DataConfig.from_tree(tree), batch_size=2, seed=3, targets=targets, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_targets_and_occupancy_labels_from_a_server_are_those_of_the_folder(local, store, workers):
    there = batches(store.url, workers=workers)
    for epoch in range(2):
        for one, two in zip(batches(local).epoch(epoch), there.epoch(epoch), strict=True):
            assert one.occupancy_cell is not None
            assert len(one.occupancy_cell) > 0
            assert one.cell_features is not None
            assert_same(one, two)
    assert sorted(fetched(store, ".targets")) == [f"{log}.targets" for log in LOGS], "each file is fetched once"
    assert sorted(fetched(store, ".occ")) == [f"{log}.occ" for log in LOGS]


def test_only_the_targets_that_are_read_are_fetched_and_a_copy_reads_on(local, store):
    targets = FeatureStore(Path(store.url) / "targets" / "fourier")
    assert targets.logs == tuple(LOGS)
    assert targets.settings == FeatureStore(local / "targets" / "fourier").settings
    assert fetched(store, ".targets") == []
    dataset = PreparedDataset(local)
    frame = dataset.frame(dataset.keyframes()[0])
    copy = pickle.loads(pickle.dumps(targets))
    found, expected = targets_of(copy, frame), targets_of(local, frame)
    assert np.array_equal(found.features, expected.features)
    assert np.array_equal(found.superclass, expected.superclass)
    assert fetched(store, ".targets") == ["scene-0001.targets"]


def test_objects_from_a_server_are_those_of_the_folder(objects, store):
    here, there = ObjectDatabase(objects / OBJECTS), ObjectDatabase(Path(store.url) / "library" / OBJECTS)
    assert len(here) == len(there) > 20
    assert there.identity == here.identity
    for row in range(len(here)):
        assert np.array_equal(here.object(row).points_lidar_m, there.object(row).points_lidar_m)
    assert len(pickle.loads(pickle.dumps(there))) == len(here)
    whole = [path for path in _cached(store) if path.read_bytes() == (objects / OBJECTS).read_bytes()]
    assert len(whole) == 1, "the columns are mapped from one file of this machine"


def test_objects_of_a_server_are_pasted_as_those_of_the_folder(objects, store):
    tree: dict[str, Any] = {
        "box_classes": ("car",),
        "objects": {"database": "train-1sweeps", "fill_to": {"car": 20}, "default_min_points": 1},
    }
    here = FrameBatches(DataConfig.from_tree({"root": str(objects), **tree}), batch_size=3, seed=1)
    there = FrameBatches(DataConfig.from_tree({"root": f"{store.url}/library", **tree}), batch_size=3, seed=1)
    for one, two in zip(here.epoch(0), there.epoch(0), strict=True):
        assert one.boxes is not None
        assert len(one.boxes) > 8 * 3
        assert_same(one, two)


def _cached(store: ObjectStore) -> list[Path]:
    return list(Path(os.environ["PICTURE3D_CACHE"]).glob("*/*.p3d"))


@pytest.mark.parametrize("trouble", [["cut"], ["503"], ["garble"], ["garble", "cut", "503"]])
@pytest.mark.parametrize("what", ["targets", "occupancy", "objects"])
def test_what_arrives_cut_or_spoilt_is_fetched_again(local, objects, store, what, trouble):
    dataset = PreparedDataset(local)
    frame = dataset.frame(dataset.keyframes()[0])
    if what == "targets":
        source = FeatureStore(Path(store.url) / "targets" / "fourier")
        store.trouble = list(trouble)
        assert np.array_equal(targets_of(source, frame).features, targets_of(local, frame).features)
    elif what == "occupancy":
        labels = OccupancyStore(Path(store.url))
        store.trouble = list(trouble)
        found, expected = labels.of(frame), OccupancyStore(local).of(frame)
        assert found is not None
        assert expected is not None
        assert np.array_equal(found.label, expected.label)
    else:
        store.trouble = ["", *trouble]  # the description is whole, the file is not
        found = ObjectDatabase(Path(store.url) / "library" / OBJECTS)
        assert np.array_equal(found.count, ObjectDatabase(objects / OBJECTS).count)
    assert store.trouble == []


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("targets/fourier/scene-0001.targets", lambda url: FeatureStore(url / "targets/fourier").file("scene-0001")),
        ("occupancy/scene-0001.occ", lambda url: OccupancyStore(url).labelled("scene-0001")),
        (f"library/{OBJECTS}", lambda url: ObjectDatabase(url / "library" / OBJECTS)),
    ],
)
def test_a_file_that_is_damaged_in_the_store_is_named_and_never_used(local, objects, store, path, read):
    content = bytearray((local / path).read_bytes())
    content[len(content) * 3 // 4 if objects in (local / path).parents else len(content) // 2] ^= 255
    (local / path).write_bytes(content)
    name = Path(path).name.replace(".", r"\.")
    with pytest.raises(DataError, match=rf"{name}: could not be fetched in 4 attempts: arrived damaged") as caught:
        read(Path(store.url))
    assert "\n" not in str(caught.value)
    assert "does not match" in str(caught.value) or "do not match" in str(caught.value)
    assert _cached(store) == []


def test_targets_of_another_run_than_the_list_are_refused(local, store):
    folder = local / "targets" / "fourier"
    tree = json.loads((folder / "files.json").read_text())
    tree["files"]["scene-0001"]["crc32c"] ^= 1
    (folder / "files.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"is not the file that files\.json was written for"):
        FeatureStore(Path(store.url) / "targets" / "fourier").file("scene-0001")


def test_what_was_not_attached_or_not_finished_is_said_with_what_to_run(local, store):
    url = Path(store.url)
    assert has_occupancy(url)
    with pytest.raises(DataError, match="holds no teacher features"):
        FeatureStore(url / "targets" / "nobody")
    with pytest.raises(MissingObject, match=r"objects/none\.objects: is not there"):
        ObjectDatabase(url / "objects" / "none.objects")
    (local / "targets" / "fourier" / "scene-0002.targets").unlink()
    write_file_list(local / "targets" / "fourier")
    with pytest.raises(DataError, match=r"no targets for log 'scene-0002'\. Run `picture3d targets`"):
        FeatureStore(url / "targets" / "fourier").file("scene-0002")
    (local / "targets" / "fourier" / "files.json").unlink()
    with pytest.raises(DataError, match=r"files\.json: is not there.*Run `picture3d targets` again"):
        FeatureStore(url / "targets" / "fourier")
    (local / "occupancy" / "occupancy.json").unlink()
    assert not has_occupancy(url)
    with pytest.raises(DataError, match=r"Run `picture3d prepare occupancy LABELS PREPARED, and upload"):
        PreparedDataset(url).occupancy()
    with pytest.raises(DataError, match="nothing is written to a URL"):
        attach_occupancy(local, PreparedDataset(url))


@pytest.mark.parametrize(
    "text", ["{}", '{"files": 3}', '{"files": {"a": {"bytes": "x", "crc32c": 1}}}', "[", '{"files": {"../a": {}}}']
)
def test_a_garbled_list_of_targets_is_an_error_in_words(local, store, text):
    (local / "targets" / "fourier" / "files.json").write_text(text)
    with pytest.raises(DataError):
        FeatureStore(Path(store.url) / "targets" / "fourier")


def test_a_damaged_file_is_not_listed_and_a_new_run_makes_it_again(local):
    folder = local / "targets" / "fourier"
    (folder / "scene-0002.targets").write_bytes(b"half")
    write_file_list(folder)
    assert list(json.loads((folder / "files.json").read_text())["files"]) == ["scene-0001"]
    compute_targets(PreparedDataset(local), FourierTeacher())
    assert list(json.loads((folder / "files.json").read_text())["files"]) == LOGS
