"""The nuScenes submission: what is written is read back, and what is wrong is refused by sample, box and field."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats import json_stream
from picture3d.formats.nuscenes_results import DetectionColumns, read_labels, read_results, rotation_of_yaw, write_results
from tests.nuscenes_submissions import draw, write_labels

BOX = {
    "sample_token": "a",
    "translation": [1, 2.5, -3],
    "size": [2, 4, 1.5],
    "rotation": [0.5, 0.5, 0.5, 0.5],
    "velocity": [1, 0],
    "detection_name": "bus",
    "detection_score": 1,
    "attribute_name": "",
}
META = {"use_lidar": True}
COLUMNS = ("sample", "translation", "size", "rotation", "velocity", "label", "score", "attribute")


def write(path, results, **more):
    path.write_text(json.dumps({"results": results, "meta": META} | more))
    return path


def test_a_submission_comes_back_to_the_last_bit_whatever_the_chunks(tmp_path, monkeypatch):
    _, found = draw(7, 3, 20, seed=1, score_digits=17)
    half = [
        DetectionColumns(
            found.samples[a:b],
            **{n: getattr(found, n)[a * 20 : b * 20] for n in (*COLUMNS[1:], "num_points")},
            sample=found.sample[a * 20 : b * 20] - a,
            ego=found.ego[a:b],
        )
        for a, b in ((0, 3), (3, 7))
    ]
    write_results(tmp_path / "r.json", iter(half), meta=META)
    for chunk in (1, 7, 1000, 1 << 20):
        monkeypatch.setattr(json_stream, "_CHUNK", chunk)
        back, meta = read_results(tmp_path / "r.json")
        assert (back.samples, meta) == (found.samples, META)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(back, name), getattr(found, name), name)
        assert np.isnan(back.ego).all()


def test_sizes_are_turned_to_length_width_height_and_quaternions_to_headings(tmp_path):
    found, _ = read_results(write(tmp_path / "r.json", {"a": [BOX, BOX | {"rotation": [3, 0, 0, 3]}], "b": []}))
    assert found.size[0].tolist() == [4, 2, 1.5]
    assert found.yaw == pytest.approx([np.pi / 2, np.pi / 2])
    assert rotation_of_yaw(np.array([np.pi / 2]))[0] == pytest.approx([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])
    assert (found.samples, len(found)) == (("a", "b"), 2)


def test_labels_have_points_and_tell_where_the_car_was_in_either_way(tmp_path):
    truth, _ = draw(3, 5, 4, seed=2)
    write_labels(tmp_path / "l.json", truth)
    back, meta = read_labels(tmp_path / "l.json")
    np.testing.assert_array_equal(back.ego, truth.ego)
    np.testing.assert_array_equal(back.num_points, truth.num_points)
    assert meta == {}
    box = BOX | {
        "num_lidar_pts": 2,
        "num_radar_pts": 3,
        "ego_translation": [1, 2, 0],
        "detection_name": "static_object.bicycle_rack",
    }
    back, _ = read_labels(write(tmp_path / "l.json", {"a": [box] * 501}))
    assert back.ego.tolist() == [[0, 0.5, -3]]
    assert set(back.num_points) == {5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"detection_score": float("nan")}, "sample a: box 1: detection_score is not finite"),
        ({"detection_score": "0.5"}, "sample a: box 1: detection_score is '0.5', not a number"),
        ({"detection_score": True}, "sample a: box 1: detection_score is True, not a number"),
        ({"translation": [1, 2]}, "box 1: translation is .*, not 3 numbers"),
        ({"translation": [1, 2, float("inf")]}, "box 1: translation is not finite"),
        ({"velocity": [float("inf"), 0]}, "box 1: velocity is not finite"),
        ({"size": [1, -1, 1]}, "box 1: size is negative"),
        ({"rotation": [0, 0, 0, 0]}, "box 1: rotation has length zero"),
        ({"detection_name": "tram"}, "box 1: detection_name is 'tram'. Write one of car, "),
        ({"detection_name": ["car"]}, "box 1: detection_name is"),
        ({"detection_name": "static_object.bicycle_rack"}, "box 1: detection_name"),
        ({"attribute_name": "vehicle.flying"}, "box 1: attribute_name is 'vehicle.flying'"),
        ({"sample_token": "b"}, "box 1: sample_token is 'b'"),
    ],
)
def test_a_wrong_value_is_refused_by_sample_box_and_field(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        read_results(write(tmp_path / "r.json", {"a": [BOX, BOX | change]}))


@pytest.mark.parametrize("field", [name for name in BOX if name != "sample_token"])
def test_a_missing_field_is_named(tmp_path, field):
    with pytest.raises(DataError, match=f"sample a: box 0: (has no )?{field}"):
        read_results(write(tmp_path / "r.json", {"a": [{k: v for k, v in BOX.items() if k != field}]}))


def test_labels_without_points_are_refused(tmp_path):
    with pytest.raises(DataError, match="sample a: box 0: has no num_lidar_pts"):
        read_labels(write(tmp_path / "l.json", {"a": [BOX]}))


def test_a_velocity_may_be_unknown(tmp_path):
    found, _ = read_results(write(tmp_path / "r.json", {"a": [BOX | {"velocity": [float("nan"), float("nan")]}]}))
    assert np.isnan(found.velocity).all()


def test_files_of_another_layout_or_cut_off_are_refused(tmp_path):
    path = tmp_path / "r.json"
    whole = json.dumps({"meta": META, "results": {"a": [BOX]}})
    wrong = {
        "[]": "not JSON near character 0",
        "": "not JSON",
        "{}": 'has no "results"',
        '{"results": {}}': 'has no object "meta"',
        '{"results": []}': "expected '{'",
        '{"meta": {}, "results": {"a": {}}}': "sample a: is not a list",
        '{"meta": {}, "results": {"a": [], "a": []}}': "sample a: is there twice",
        whole + "x": "text after the end",
        '{"meta": {}, "results": {"a": ' + "[" * 100_000: "not JSON",
    }
    for text, words in wrong.items():
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_results(path)
    for end in range(0, len(whole), 3):
        path.write_text(whole[:end])
        with pytest.raises(DataError):
            read_results(path)
    with pytest.raises(DataError, match="no such file"):
        read_results(tmp_path / "absent.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_results(path)


def test_more_than_500_boxes_are_neither_read_nor_written(tmp_path):
    assert len(read_results(write(tmp_path / "r.json", {"a": [BOX] * 500}))[0]) == 500
    with pytest.raises(DataError, match="sample a: has 501 boxes"):
        read_results(write(tmp_path / "r.json", {"a": [BOX] * 501}))
    _, found = draw(1, 1, 501, seed=0)
    with pytest.raises(DataError, match="has 501 boxes"):
        write_results(tmp_path / "w.json", [found])
    assert not list(tmp_path.glob("w.json*"))


def test_what_no_server_takes_is_not_written(tmp_path):
    _, found = draw(2, 1, 3, seed=0)
    with pytest.raises(DataError, match="comes twice"):
        write_results(tmp_path / "w.json", [found, found])
    with pytest.raises(DataError, match="score is not finite"):
        write_results(tmp_path / "w.json", [replace(found, score=np.full(6, np.nan))])
    write_results(tmp_path / "w.json", [])
    assert json.loads((tmp_path / "w.json").read_text())["results"] == {}
