"""Which runs a report finds, in which order, and what it says of a damaged one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from picture3d.commands import report
from picture3d.errors import DataError
from picture3d.recipes.catalogue import pretraining_recipe, segmentation_recipe, tiny


def written(folder: Path, name: str, *, pretraining: bool = False, encoder: Path | None = None) -> Path:
    """A run folder as far as a report looks for one."""
    (folder / name).mkdir()
    if pretraining:
        config = tiny(pretraining_recipe("town-picture", folder / "prepared"))
    else:
        config = tiny(segmentation_recipe("town-segmentation", folder / "prepared")).model_copy(update={"pretrained": encoder})
    config.save(folder / name / "config.json")
    (folder / name / "metrics.jsonl").write_text("")
    return folder / name


def test_the_order_of_runs_depends_on_no_clock(tmp_path):
    written(tmp_path, "a-tuned", encoder=tmp_path / "picture")
    written(tmp_path, "scratch")
    written(tmp_path, "picture", pretraining=True)
    expected = ["picture", "scratch", "a-tuned"]
    assert [run.name for run in report.find_runs(tmp_path)] == expected
    for time, name in enumerate(reversed(expected)):
        os.utime(tmp_path / name / "config.json", (time, time))
    assert [run.name for run in report.find_runs(tmp_path)] == expected


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"iou": 3}', b"[" * 100_000, b"\xff\xfe"])
def test_scores_that_are_none_are_named(tmp_path, content):
    (written(tmp_path, "scratch") / "evaluation_val.json").write_bytes(content)
    with pytest.raises(DataError, match=r"scratch/evaluation_val\.json: .*again"):
        report._scores(report.find_runs(tmp_path))


def test_a_file_larger_than_scores_can_be_is_not_read(tmp_path):
    with (written(tmp_path, "scratch") / "evaluation_val.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"evaluation_val\.json: more than the"):
        report._scores(report.find_runs(tmp_path))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("town-coordinates", "points"),
        ("town-features", "teacher features"),
        ("town-picture", "points and teacher features"),
        ("town-picture-visible", "points and teacher features, of visible voxels too"),
        ("town-distillation", "teacher features of visible voxels"),
    ],
)
def test_a_pretraining_is_described_by_what_it_asks(tmp_path, recipe, words):
    assert report.taught(pretraining_recipe(recipe, tmp_path).loss) == words
