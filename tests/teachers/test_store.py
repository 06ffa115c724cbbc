from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.errors import DataError
from picture3d.ops.quantize import Quantisation, quantise_points
from picture3d.teachers.feature_basis import BasisFit
from picture3d.teachers.feature_codecs import FeatureCodec, decode_features, encode_features, smallest_codec, stored_cosine
from picture3d.teachers.store import FeatureStore, StoreSettings, derive_cells, store_folder, target_path
from picture3d.teachers.target_file import TargetEntry, TargetFile
from picture3d.teachers.targets import OnlineTeacherSource, compute_targets
from tests.teachers.made_teachers import FourierTeacher, Key, MadeDataset, made_frame, made_points


@pytest.fixture
def dataset(tmp_path: Path) -> MadeDataset:
    return MadeDataset(tmp_path, {"log-a": 5, "log-b": 3})


def stored(dataset: MadeDataset, teacher: FourierTeacher | None = None, **changes: object) -> FeatureStore:
    teacher = teacher or FourierTeacher()
    return FeatureStore(compute_targets(dataset, teacher, **changes).folder)  # pyright: ignore[reportArgumentType]


# Codecs ------------------------------------------------------------------------------------------------------------------


def test_float16_keeps_half_precision_to_the_last_bit():
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    data = np.frombuffer(bytearray(encode_features(features, FeatureCodec.FLOAT16)), np.uint8)
    assert np.array_equal(decode_features(data, FeatureCodec.FLOAT16, 7, 5), features.astype(np.float16))


def test_int8_is_off_by_at_most_half_a_step_of_its_channel():
    features = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32) * [1e-4, 1, 100, 0, 3]
    features = features.astype(np.float32)
    data = np.frombuffer(bytearray(encode_features(features, FeatureCodec.INT8)), np.uint8)
    assert len(data) == 200 * 5 + 4 * 5
    read = decode_features(data, FeatureCodec.INT8, 200, 5).astype(np.float64)
    step = np.abs(features).max(0) / 127
    # Half a step, and the rounding of the result to float16.
    assert np.all(np.abs(read - features) <= step / 2 + np.abs(features) * 2.0**-10 + 2.0**-24)
    assert np.all(read[:, 3] == 0)


@pytest.mark.parametrize("codec", list(FeatureCodec))
@pytest.mark.parametrize("cells", [0, 1])
def test_few_cells_and_zeros_are_stored(codec: FeatureCodec, cells: int):
    features = np.zeros((cells, 3), np.float32)
    fit = BasisFit(3, 1, seed=0)
    fit.add(fit.moments(0, features))
    basis = fit.code_books(torch.Generator()) if codec is FeatureCodec.PRODUCT else fit.principal()
    encoded = encode_features(features, codec, basis)
    read = decode_features(np.frombuffer(bytearray(encoded), np.uint8), codec, cells, 3, basis)
    assert read.tolist() == features.tolist()
    assert stored_cosine(features, encoded, codec, basis) == 1.0


def test_auto_takes_int8_while_the_cosine_holds_and_float16_where_it_does_not():
    rng = np.random.default_rng(0)
    codec, _, cosine = smallest_codec(rng.normal(size=(500, 16)).astype(np.float32))
    assert codec is FeatureCodec.INT8
    assert 0.995 <= cosine < 1
    # One huge row makes the steps so wide that the others vanish.
    spoiled = rng.normal(size=(500, 16)).astype(np.float32)
    spoiled[0] = 10_000
    codec, _, cosine = smallest_codec(spoiled)
    assert codec is FeatureCodec.FLOAT16
    assert cosine > 0.9999


def test_features_that_cannot_be_stored_are_refused():
    with pytest.raises(DataError, match="not finite"):
        encode_features(np.array([[np.nan]], np.float32), FeatureCodec.INT8)
    with pytest.raises(DataError, match="too large"):
        encode_features(np.array([[1e6]], np.float32), FeatureCodec.FLOAT16)
    with pytest.raises(DataError, match="are not 2"):
        decode_features(np.zeros(5, np.uint8), FeatureCodec.INT8, 2, 3)


# Cells -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 200),
    spread=st.sampled_from([0.01, 1.0, 60.0, 1e5]),
    kind=st.sampled_from(["cartesian", "cylindrical"]),
    spoiled=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_derived_cells_are_those_of_the_teachers_quantisation(count: int, spread: float, kind: str, spoiled: int, seed: int):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(scale=spread, size=(count, 3)).astype(np.float32)
    xyz[rng.integers(0, max(count, 1), min(spoiled, count)), rng.integers(0, 3)] = [np.nan, np.inf][seed % 2]
    quantisation = Quantisation("cartesian", (0.1, 0.2, 0.3)) if kind == "cartesian" else Quantisation()
    expected = quantise_points(torch.from_numpy(xyz), quantisation).point_cell.numpy()
    assert np.array_equal(derive_cells(xyz, quantisation), expected)


def test_cells_of_read_only_and_strided_points_are_derived():
    wide = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    wide.setflags(write=False)
    quantisation = Quantisation("cartesian", (0.3, 0.3, 0.3))
    expected = quantise_points(torch.from_numpy(wide[:, :3].copy()), quantisation).point_cell.numpy()
    assert np.array_equal(derive_cells(wide[:, :3], quantisation), expected)


# Store -------------------------------------------------------------------------------------------------------------------


def test_stored_targets_are_the_teachers_rounded(dataset: MadeDataset):
    teacher = FourierTeacher()
    store = stored(dataset, codec="float16")
    for key in dataset.keyframes():
        frame = dataset.frame(key)
        read = store.targets(frame)
        assert read is not None
        cells = teacher.cell_features(frame.points)
        assert np.array_equal(read.features, cells.features.numpy().astype(np.float16))
        assert np.array_equal(read.point_cell, cells.point_cell.numpy())
        assert read.superclass.dtype == np.uint8
        assert len(np.unique(read.superclass)) == min(8, len(cells.features))


def test_a_store_and_the_teacher_on_the_spot_agree(dataset: MadeDataset):
    store, online = stored(dataset, codec="float16"), OnlineTeacherSource(FourierTeacher())
    for key in dataset.keyframes():
        a, b = store.targets(dataset.frame(key)), online.targets(dataset.frame(key))
        assert a is not None
        assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("features", "superclass", "point_cell"))
        assert a.features.dtype == b.features.dtype == np.float16


def test_frames_that_are_no_keyframes_have_no_targets(dataset: MadeDataset):
    assert stored(dataset).targets(dataset.frame(Key("log-a", 1))) is None


def test_frames_are_read_in_any_order_by_few_open_files_and_in_another_process(dataset: MadeDataset):
    folder = stored(dataset).folder
    store = FeatureStore(folder, open_files=1)
    expected = {key: store.targets(dataset.frame(key)) for key in dataset.keyframes()}
    for source in (store, pickle.loads(pickle.dumps(store))):
        for key in reversed(dataset.keyframes()):
            read, first = source.targets(dataset.frame(key)), expected[key]
            assert read is not None
            assert first is not None
            assert np.array_equal(read.features, first.features)


def test_points_that_changed_are_refused(dataset: MadeDataset):
    store = stored(dataset)
    frame = dataset.frame(Key("log-a", 2))
    moved = frame.points.xyz.copy()
    moved[7, 1] = np.nextafter(moved[7, 1], np.float32(99))  # the same cells, by far most likely
    with pytest.raises(DataError, match=r"log-a\.targets: frame 2: .*other points.*picture3d targets"):
        store.targets(replace(frame, points=replace(frame.points, xyz=moved)))
    with pytest.raises(DataError, match="other points"):
        store.targets(replace(frame, points=frame.points.select(np.arange(10)), labels=None))


def test_a_missing_log_and_a_missing_store_say_what_to_run(dataset: MadeDataset, tmp_path: Path):
    store = stored(dataset)
    with pytest.raises(DataError, match=r"no targets for log 'log-z'.*picture3d targets"):
        store.targets(made_frame("log-z", 0, made_points(3)))
    with pytest.raises(DataError, match=r"no teacher\.json.*picture3d targets"):
        FeatureStore(tmp_path / "absent")


def test_names_cannot_leave_the_folder(tmp_path: Path):
    for name in ("../x", "a/b", "", ".hidden", "a\\b"):
        with pytest.raises(DataError, match="cannot name a file"):
            target_path(tmp_path, name)
        with pytest.raises(DataError, match="cannot name a file"):
            store_folder(tmp_path, name)


def test_every_cut_of_a_file_is_refused(dataset: MadeDataset):
    store = stored(dataset)
    path = target_path(store.folder, "log-b")
    whole = path.read_bytes()
    for keep in {0, 1, 15, 16, 40, 56, len(whole) // 2, len(whole) - 41, len(whole) - 1}:
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=r"log-b\.targets.*picture3d targets"):
            FeatureStore(store.folder).targets(dataset.frame(Key("log-b", 2)))


def test_every_flipped_byte_that_is_read_is_found(dataset: MadeDataset):
    store = stored(MadeDataset(dataset.root, {"log-b": 3}, points=20), FourierTeacher(dimension=2))
    path = target_path(store.folder, "log-b")
    frame = MadeDataset(dataset.root, {}, points=20).frame(Key("log-b", 2))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        entry = entry_if_readable(path)
        if entry is not None and not entry.offset <= place < entry.offset + entry.length:
            continue  # in the block of the other frame, which is not read
        with pytest.raises(DataError, match=r"log-b\.targets"):
            FeatureStore(store.folder).targets(frame)


def entry_if_readable(path: Path) -> TargetEntry | None:
    try:
        return TargetFile(path, StoreSettings.load(path.parent).basis).entries.get(2)
    except DataError:
        return None


def test_files_of_another_teacher_are_refused(dataset: MadeDataset, tmp_path: Path):
    here = stored(dataset)
    there = stored(dataset, FourierTeacher(fingerprint="another"), folder=tmp_path / "there")
    target_path(here.folder, "log-a").write_bytes(target_path(there.folder, "log-a").read_bytes())
    with pytest.raises(DataError, match="another teacher or with other settings"):
        FeatureStore(here.folder).targets(dataset.frame(Key("log-a", 2)))
    # The right teacher under the wrong name.
    target_path(there.folder, "log-a").write_bytes(target_path(there.folder, "log-b").read_bytes())
    with pytest.raises(DataError, match="another teacher"):
        FeatureStore(there.folder).targets(dataset.frame(Key("log-a", 2)))


def test_settings_come_back_and_garbled_ones_are_refused(tmp_path: Path):
    wanted = StoreSettings.of(FourierTeacher(), num_superclasses=5, seed=3, codec="int8")
    wanted.save(tmp_path)
    assert StoreSettings.load(tmp_path) == wanted
    assert StoreSettings.load(tmp_path).digest == wanted.digest
    assert wanted.differences(replace(wanted, seed=4, fingerprint="x")) == [
        "fingerprint (there 00c0ffee, here x)",
        "seed (there 3, here 4)",
    ]
    path = tmp_path / "teacher.json"
    text = path.read_text()
    for broken in (
        text.replace('"seed"', '"sead"'),
        text.replace("cartesian", "spherical"),
        text.replace("-targets", "-tables"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"teacher\.json"):
            StoreSettings.load(tmp_path)
