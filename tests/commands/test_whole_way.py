"""From a raw town to scores and a report by the commands a user types, at the smallest size; then what else they promise."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from picture3d.cli import main
from picture3d.datasets.loading import FrameBatches
from picture3d.errors import ConfigError, Picture3dError
from picture3d.recipes.catalogue import pretraining_recipe, segmentation_recipe, tiny
from picture3d.structures.batch import PointBatch
from tests.command_line import do


@dataclass(frozen=True)
class Way:
    """Folders of one walk through the commands, and what each command printed."""

    root: Path
    said: dict[str, str]

    def __getattr__(self, name: str) -> Path:
        return self.root / name


def pretrain(way_root: Path, out: Path, *more: object) -> str:
    return do("pretrain", "--config", way_root / "pretrain.json", "--out", out, *more)


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    root = tmp_path_factory.mktemp("way")
    raw, prepared, runs = root / "raw", root / "prepared", root / "runs"
    said = {"synth": do("synth", raw, "--scenes", 3, "--keyframes", 2, "--sweeps-per-keyframe", 1, "--val-scenes", 1)}
    said["prepare"] = do("prepare", "nuscenes", raw, prepared)
    said["targets"] = do("targets", prepared, "--teacher", "town")
    tiny(pretraining_recipe("town-picture", prepared)).save(root / "pretrain.json")
    tiny(segmentation_recipe("town-segmentation", prepared)).save(root / "segment.json")
    said["pretrain"] = pretrain(root, runs / "picture", "--max-steps", 2)
    for name, encoder in (("scratch", []), ("picture", ["--encoder", runs / "picture"])):
        out = runs / f"segment-{name}"
        words = ("finetune", "segmentation", "--config", root / "segment.json", "--out", out, "--label-share", 0.5)
        said[f"finetune {name}"] = do(*words, *encoder)
        said[f"evaluate {name}"] = do("evaluate", out, "--json")
    said["probe"] = do("probe", runs / "picture", "--json")
    said["report"] = do("report", root, "--data", prepared)
    return Way(root, said)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on standard error of a command that must exit with 2."""
    monkeypatch.setattr(sys, "argv", ["picture3d", *(str(word) for word in words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    err = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2, err
    assert err[-1].startswith("error: ")
    return err[-1]


def test_every_step_says_what_it_left(way: Way):
    assert "3 scenes of 2 keyframes" in way.said["synth"]
    assert "3 logs (3 made now)" in way.said["prepare"]
    assert "6 keyframes" in way.said["targets"]
    assert "finished after 2 steps" in way.said["pretrain"]
    for text in way.said.values():
        assert text.count("\n") == 1
        assert "PosixPath" not in text


def test_a_run_folder_holds_config_metrics_summary_environment_and_weights(way: Way):
    for name, losses in (("picture", {"coordinates", "features"}), ("segment-scratch", {"cross_entropy", "lovasz"})):
        run = way.root / "runs" / name
        summary = json.loads((run / "summary.json").read_text())
        assert {"status", "steps", "epochs", "seconds", "data_seconds", "parameters", "losses"} <= set(summary)
        assert (summary["status"], summary["steps"]) == ("finished", 2)
        assert losses <= set(summary["losses"])
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
        assert {"config.json", "environment.json", "model.safetensors", "log.txt"} <= {p.name for p in run.iterdir()}


def test_fine_tuning_says_where_its_encoder_is_from(way: Way):
    picture, scratch = ((way.root / "runs" / f"segment-{name}" / "log.txt").read_text() for name in ("picture", "scratch"))
    assert re.search(r"encoder from .*runs/picture: encoder: (\d+) of \1 tensors loaded\. skipped .* new in this ", picture)
    assert "encoder from scratch" in scratch
    assert "% of the labels)" in scratch


def test_scores_are_printed_as_json_and_kept_in_the_run(way: Way):
    run = way.root / "runs" / "segment-picture"
    printed = json.loads(way.said["evaluate picture"])
    assert printed == json.loads((run / "evaluation_val.json").read_text())
    assert len(printed["iou"]) == 16
    assert 0 <= printed["miou"] <= 1
    assert printed["num_points"] == sum(map(sum, printed["confusion"]))
    assert json.loads((run / "summary.json").read_text())["miou_val"] == printed["miou"]
    probe = json.loads(way.said["probe"])
    assert json.loads((way.root / "runs" / "picture" / "probe.json").read_text())["miou"] == probe["miou"]
    assert set(probe["knn"]["iou"]) == set(probe["iou"])
    rank = probe["effective_rank"]
    assert rank["columns"] == 64
    assert 1 < rank["overall"] <= 64
    assert set(rank["by_class"]) <= set(probe["iou"])
    summary = json.loads((way.root / "runs" / "picture" / "summary.json").read_text())
    assert (summary["probe_miou"], summary["knn_miou"]) == (probe["miou"], probe["knn"]["miou"])
    assert summary["rank"] == rank["overall"]


def test_the_teacher_of_a_pre_training_is_probed_on_the_voxels_of_its_encoder(way: Way):
    text = do("probe", way.root / "runs" / "picture", "--teacher", "--knn", 0)
    head, *rows, note = text.splitlines()
    assert head.startswith("probe of the teacher of")
    assert "(64 columns)" in note
    assert all(row.split()[-3] == "-" for row in rows[2:])  # no neighbours were asked for
    kept = json.loads((way.root / "runs" / "picture" / "probe_teacher.json").read_text())
    assert f"{100 * kept['miou']:.2f}" == rows[-1].split()[-4]


def test_evaluate_prints_a_table_of_all_classes(way: Way):
    text = do("evaluate", way.root / "runs" / "segment-scratch")
    assert all(name in text for name in ("driveable_surface", "vegetation", "mIoU"))


def test_the_report_is_one_page_that_loads_nothing(way: Way):
    page = (way.root / "report.html").read_text()
    assert not re.findall(
        r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import|fetch\(""", page
    )
    assert "segment" not in re.findall(r"<title>(.*?)</title>", page)[0]
    assert all(word in page for word in ("scratch", "picture", "driveable"))


def test_a_finished_step_is_not_done_again(way: Way):
    run = way.root / "runs" / "picture"
    before = (run / "model.safetensors").stat().st_mtime_ns
    assert "was already finished after 2 steps" in pretrain(way.root, run, "--max-steps", 2)
    assert (run / "model.safetensors").stat().st_mtime_ns == before
    assert "(0 made now)" in do("prepare", "nuscenes", way.root / "raw", way.root / "prepared")
    assert "(0 made now)" in do("targets", way.root / "prepared")


def test_a_saved_config_repeats_the_run_to_the_byte(way: Way, tmp_path: Path):
    run = way.root / "runs" / "picture"
    do("pretrain", "--config", run / "config.json", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_cut_after_its_first_step_ends_with_the_bytes_of_an_unbroken_one(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole: Callable[..., Iterator[PointBatch]] = FrameBatches.epoch

    def cut(self: FrameBatches, epoch: int, start_step: int = 0) -> Iterator[PointBatch]:
        for count, batch in enumerate(whole(self, epoch, start_step)):
            if count == 1:
                raise KeyboardInterrupt
            yield batch

    run = tmp_path / "cut"
    words = ("pretrain", "--config", way.root / "pretrain.json", "--out", run, "--max-steps", 2)
    monkeypatch.setattr(FrameBatches, "epoch", cut)
    monkeypatch.setattr(sys, "argv", ["picture3d", *(str(word) for word in words)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert not (run / "model.safetensors").exists()
    monkeypatch.setattr(FrameBatches, "epoch", whole)

    assert "unfinished run. Go on with it (--resume)" in refused(monkeypatch, capsys, *words)
    assert "finished after 2 steps" in do(*words, "--resume")
    assert (run / "model.safetensors").read_bytes() == (way.root / "runs" / "picture" / "model.safetensors").read_bytes()


def test_a_folder_of_another_config_is_refused(way: Way, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("pretrain", "--config", way.root / "pretrain.json", "--out", way.root / "runs" / "picture")
    line = refused(monkeypatch, capsys, *words, "--set", "training.seed=7")
    assert "training.seed (there 0, here 7)" in line


@pytest.mark.parametrize(
    "change", ["encoder.channels=64", 'data.features=["intensity","time_lag"]', "data.intensity_scale=raw"]
)
def test_an_encoder_that_does_not_match_is_refused(
    change: str, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = refused(
        monkeypatch, capsys, "finetune", "segmentation", "--config", way.root / "segment.json", "--out", tmp_path / "run",
        "--encoder", way.root / "runs" / "picture", "--set", change,
    )  # fmt: skip
    assert str(way.root / "runs" / "picture") in line
    assert not (tmp_path / "run").exists()


def test_a_smaller_share_of_labels_is_part_of_a_larger_one(way: Way):
    config = tiny(segmentation_recipe("town-segmentation", way.root / "prepared"))

    def logs(share: float) -> set[str]:
        data = config.data.model_copy(update={"label_share": share})
        return {key.log for key in FrameBatches(data, batch_size=1, seed=0).keys}

    assert logs(0.1) == logs(0.5) < logs(1.0)
    assert (len(logs(0.5)), len(logs(1.0))) == (1, 2)


def test_scores_are_refused_where_they_mean_nothing(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert "picture3d probe" in refused(monkeypatch, capsys, "evaluate", way.root / "runs" / "picture")
    assert "label_share" in refused(monkeypatch, capsys, "probe", way.root / "runs" / "picture", "--label-share", 0)
    assert "no teacher" in refused(monkeypatch, capsys, "probe", way.root / "runs" / "segment-picture", "--teacher")
    run = tmp_path / "unfinished"
    run.mkdir()
    shutil.copy(way.root / "runs" / "segment-scratch" / "config.json", run)
    assert str(run) in refused(monkeypatch, capsys, "evaluate", run)
    assert "no split 'night'" in refused(
        monkeypatch, capsys, "evaluate", way.root / "runs" / "segment-scratch", "--split", "night"
    )


def test_pretraining_on_frames_without_targets_says_which_command_makes_them(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bare = tmp_path / "bare"
    shutil.copytree(way.root / "prepared", bare, ignore=shutil.ignore_patterns("targets"))
    words = ("pretrain", "--config", way.root / "pretrain.json", "--data", bare, "--out", tmp_path / "run")
    assert "picture3d targets" in refused(monkeypatch, capsys, *words)
    do(*words, "--max-steps", 1, "--set", "targets.mode=online")


def test_ones_own_unlabelled_sweeps_are_prepared_and_learnt_from(way: Way, tmp_path: Path):
    raw = tmp_path / "sweeps"
    raw.mkdir()
    for path in sorted((way.root / "raw" / "samples" / "LIDAR_TOP").iterdir())[:2]:
        shutil.copy(path, raw / path.name.replace(".pcd.bin", ".bin"))
    said = do("prepare", "points", raw, tmp_path / "own", "--layout", "x,y,z,intensity,ring", "--intensity", "0-255")
    assert "0 of them labelled" in said
    run = tmp_path / "run"
    pretrain(way.root, run, "--data", tmp_path / "own", "--max-steps", 1, "--set", "targets.mode=online")
    do("report", tmp_path, "--out", tmp_path / "page" / "report.html")
    assert (tmp_path / "page" / "report.html").is_file()


@pytest.mark.long
def test_the_tiny_demo_ends_with_a_summary_and_a_second_one_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "demo"
    first = do("demo", "--tiny", "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert {"seconds", "scores", "report"} <= set(summary)
    assert list(summary["scores"]) == ["scratch", "coordinates", "picture", "picture-visible"]
    assert all(0 <= score["miou"] <= 1 for score in summary["scores"].values())
    assert Path(summary["report"]).is_file()
    assert summary["report"] in first

    def untouchable(*_: object, **__: object) -> None:
        raise Picture3dError("a finished demo does nothing again")

    monkeypatch.setattr("picture3d.commands.demo.data_commands.synth", untouchable)
    second = do("demo", "--tiny", "--out", out)
    assert "already finished" in second
    assert json.loads((out / "summary.json").read_text()) == summary
    with pytest.raises(ConfigError, match="other size"):
        do("demo", "--out", out)
