"""`picture3d experiment label-efficiency`, as a user types it, on a town of three scenes and a grid of few cells."""

from __future__ import annotations

import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from picture3d.cli import app
from picture3d.commands import experiment
from picture3d.commands.score import Evaluation
from picture3d.errors import ConfigError, DataError
from tests.command_line import do

_SMALL = ["grid.voxel_size=[0.8,0.8,1.0]", "encoder.channels=32", "encoder.ffn_channels=64"]
_SMALL += [
    "encoder.windows=[[12,12,8],[12,12,1]]",
    "encoder.strides=[[1,1,8]]",
    "training.max_steps=1",
    "training.batch_size=1",
]
_BLIND = ["targets.mode=none", "mask.kind=random"]


def words(data: Path, out: Path, **options: str) -> list[object]:
    found: list[object] = ["experiment", "label-efficiency", "--data", data, "--out", out, "--device", "cpu"]
    for name, value in options.items():
        found += [f"--{name}", value]
    for setting in _SMALL:
        found += ["--pretrain-set", setting, "--finetune-set", setting]
    for setting in _BLIND:
        found += ["--pretrain-set", setting]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    do("synth", root / "raw", "--scenes", 3, "--keyframes", 1, "--sweeps-per-keyframe", 0, "--val-scenes", 1, "--occupancy")
    do("prepare", "nuscenes", root / "raw", root / "prepared", "--sweeps", 0)
    do("prepare", "occupancy", root / "raw", root / "prepared")
    return root / "prepared"


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells") / "experiment"
    said = do(*words(data, folder, methods="scratch,town-coordinates", shares="0.5,1", seeds="0"), "--json")
    assert len(json.loads(said)["cells"]) == 4
    return folder


def test_every_cell_has_a_row_and_smaller_shares_lie_within_larger_ones(out: Path):
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    assert {(row["method"], row["share"]) for row in rows} == {
        (method, share) for method in ("scratch", "town-coordinates") for share in (0.5, 1.0)
    }
    assert {row["share"]: row["labelled_frames"] for row in rows} == {0.5: 1, 1.0: 2}
    assert all(row["steps"] == 1 for row in rows)


def test_cells_of_one_seed_differ_in_the_encoder_alone(out: Path):
    configs = {
        method: json.loads((out / "runs" / f"{method}-0.5-seed0" / "config.json").read_text())
        for method in ("scratch", "town-coordinates")
    }
    assert configs["scratch"].pop("pretrained") is None
    assert configs["town-coordinates"].pop("pretrained").endswith("pretrain-town-coordinates-seed0")
    assert configs["scratch"] == configs["town-coordinates"]


def test_the_seed_of_a_cell_chooses_scenes_weights_and_masks_and_settings_reach_both_trainings(data: Path):
    plan = experiment.Plan(
        data, ("scratch",), (0.5,), (3,), pretrain_set=("mask.kind=random",), finetune_set=("training.optim.peak_lr=0.5",)
    )
    tuning, pretraining = plan.tuning(0.5, 3, Path("encoder")), plan.pretraining("town-features", 3)
    assert (tuning.data.label_share, tuning.data.label_seed, tuning.training.seed) == (0.5, 3, 3)
    assert (tuning.pretrained, tuning.training.optim.peak_lr) == (Path("encoder"), 0.5)
    assert (pretraining.training.seed, pretraining.mask.kind, pretraining.loss.coordinates_weight) == (3, "random", 0.0)


def test_cells_may_share_an_encoder_and_say_which(data: Path, tmp_path: Path):
    options = {"methods": "scratch,town-coordinates", "shares": "0.5", "seeds": "0,2,3", "encoders": "2"}
    cells = json.loads(do(*words(data, tmp_path / "shared", **options), "--json"))["cells"]
    found = {row["seed"]: row["encoder_seed"] for row in cells if row["method"] == "town-coordinates"}
    assert found == {0: 0, 2: 0, 3: 1}
    assert all("encoder_seed" not in row for row in cells if row["method"] == "scratch")
    runs = tmp_path / "shared" / "runs"
    assert sorted(path.name for path in runs.glob("pretrain-*")) == [f"pretrain-town-coordinates-seed{n}" for n in (0, 1)]
    seeds = {
        name: json.loads((runs / name / "config.json").read_text())
        for name in ("town-coordinates-0.5-seed2", "scratch-0.5-seed2")
    }
    assert {config["data"]["label_seed"] for config in seeds.values()} == {2}
    with pytest.raises(ConfigError, match="at least one"):
        experiment.label_efficiency_experiment(
            experiment.Plan(data, ("scratch",), (0.5,), (0,), encoders=0),
            tmp_path / "none",
            device="cpu",
            threads=1,
            as_json=True,
        )


def test_scores_that_do_not_exist_are_no_zeros(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = Evaluation("mIoU", None, {"car": None}, {}, "", {})
    monkeypatch.setattr(experiment, "run_evaluation", lambda *_, **__: nothing)
    with pytest.raises(DataError, match="no label to score on"):
        do(*words(data, tmp_path / "x", methods="scratch", shares="1", seeds="0"))
    assert not list((tmp_path / "x").glob("cells/*"))


def test_scores_are_those_of_the_run_folders(out: Path):
    for path in (out / "cells").glob("*.json"):
        row = json.loads(path.read_text())
        folder = out / "runs" / f"{row['method']}-{row['share']:g}-seed{row['seed']}"
        kept = json.loads((folder / "evaluation_val.json").read_text())
        assert (row["measure"], row["score"], row["by_class"]) == ("mIoU", kept["miou"], kept["iou"])


# One sweep, as the encoders are pre-trained; an occupancy network looks further than they do.
_DETECTION = ("data.sweeps=1", 'data.features=["intensity"]', "data.objects=null", "task.bev.blocks=[0,0]")
_OCCUPANCY = ("grid.voxel_size=[0.8,0.8,1.0]", "task.strides=[1,2]", "task.blocks=[0,0]", "task.channels=[16,16]")


@pytest.mark.parametrize(
    ("recipe", "measure", "score", "classes", "settings"),
    [
        ("town-detection", "mAP", "mean_ap", "mean_dist_aps", _DETECTION),
        ("town-occupancy", "mIoU", "miou", "iou", _OCCUPANCY),
    ],
)
def test_every_task_can_be_compared_by_its_own_measure(
    data: Path, tmp_path: Path, recipe: str, measure: str, score: str, classes: str, settings: tuple[str, ...]
):
    given = words(data, tmp_path / "x", methods="scratch,town-coordinates", shares="0.5", seeds="0", recipe=recipe)
    for setting in settings:
        given += ["--finetune-set", setting]
    table = do(*given)
    assert f"{measure}, %" in table
    for method in ("scratch", "town-coordinates"):
        row = json.loads((tmp_path / "x" / "cells" / f"{method}_0.5_0.json").read_text())
        kept = json.loads((tmp_path / "x" / "runs" / f"{method}-0.5-seed0" / "evaluation_val.json").read_text())
        assert (row["measure"], row["score"], row["by_class"]) == (measure, kept[score], kept[classes])
        assert row["labelled_frames"] == 1
    page = html.unescape(re.sub(r"<[^>]+>", " ", (tmp_path / "x" / "report.html").read_text()))
    assert f"{measure}, %" in page
    assert "The axis of keyframes" not in page, "one point is no curve"
    assert {"mAP": "Mean average precision", "mIoU": "Mean intersection over union"}[measure] in page


def test_the_drawing_is_well_formed_and_names_each_method(out: Path):
    text = "".join(ElementTree.fromstring((out / "curves.svg").read_text()).itertext())
    assert "scratch" in text
    assert "town-coordinates" in text


def test_the_page_is_made_of_the_rows_alone_and_says_what_the_table_says(out: Path, tmp_path: Path):
    kept = tmp_path / "rows"
    shutil.copytree(out / "cells", kept / "cells")
    shutil.copy(out / "experiment.json", kept)
    assert do("report", kept).strip() == f"report: {kept / 'report.html'}"
    assert (kept / "report.html").read_bytes() == (out / "report.html").read_bytes()
    page = html.unescape(re.sub(r"<[^>]+>", " ", (kept / "report.html").read_text()))
    for row in json.loads((out / "results.json").read_text())["rows"]:
        assert f"{100 * row['score']['mean']:.1f}" in page
    assert "1/2 of the labels, 1 keyframes" in page
    assert "One seed" in page
    assert str(tmp_path) not in page


def test_an_experiment_without_a_cell_has_no_page(out: Path, tmp_path: Path):
    shutil.copy(out / "experiment.json", tmp_path)
    with pytest.raises(DataError, match="no cell is finished"):
        do("report", tmp_path)


def test_rows_say_what_their_frozen_encoder_knows_if_asked(data: Path, tmp_path: Path):
    do(*words(data, tmp_path / "x", methods="scratch,town-coordinates", shares="1", seeds="0"), "--probe", 0.5)
    rows = {row["method"]: row for row in (json.loads(path.read_text()) for path in (tmp_path / "x").glob("cells/*.json"))}
    probed = json.loads((tmp_path / "x" / "runs" / "pretrain-town-coordinates-seed0" / "summary.json").read_text())
    assert {name: rows["town-coordinates"][name] for name in experiment.PROBED} == {
        name: probed[name] for name in experiment.PROBED
    }
    assert rows["town-coordinates"]["probe_share"] == 0.5
    assert not set(experiment.PROBED) & set(rows["scratch"])
    assert "Frozen encoders" in (tmp_path / "x" / "report.html").read_text()


def test_the_same_data_elsewhere_goes_on_and_other_data_is_refused(out: Path, data: Path, tmp_path: Path):
    elsewhere = tmp_path / "moved"
    shutil.copytree(data, elsewhere)
    do(*words(elsewhere, out, methods="scratch,town-coordinates", shares="0.5,1", seeds="0"))
    tree = json.loads((elsewhere / "dataset.json").read_text())
    tree["splits"]["val"] = []
    (elsewhere / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="another experiment: data is"):
        do(*words(elsewhere, out, methods="scratch", shares="0.5", seeds="0"))


def test_a_lost_row_is_made_again_and_nothing_else(out: Path, data: Path):
    lost = out / "cells" / "scratch_0.5_0.json"
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.safetensors")}
    text = lost.read_text()
    lost.unlink()
    do(*words(data, out, methods="scratch,town-coordinates", shares="0.5,1", seeds="0"))
    assert json.loads(lost.read_text()) == json.loads(text)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.safetensors")} == before


def test_other_common_settings_are_refused_and_the_table_stays(out: Path, data: Path):
    table = (out / "table.md").read_text()
    with pytest.raises(ConfigError, match=r"another experiment: finetune_set is"):
        do(*words(data, out, methods="scratch", shares="0.5", seeds="0"), "--finetune-set", "training.optim.peak_lr=0.1")
    assert (out / "table.md").read_text() == table


def test_another_backbone_is_refused_before_any_work(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="differ in encoder, grid"):
        do("experiment", "label-efficiency", "--data", data, "--out", tmp_path / "x", "--methods", "scratch,waymo-picture")
    assert not (tmp_path / "x" / "runs").exists()


@pytest.mark.parametrize("option", [{"seeds": "0,0"}, {"methods": "scratch,scratch"}, {"shares": "0.5,0.5"}])
def test_what_is_named_twice_is_refused(data: Path, tmp_path: Path, option: dict[str, str]):
    with pytest.raises(ConfigError, match="none twice"):
        do(*words(data, tmp_path / "x", **option))


def test_shares_that_cannot_be_are_refused(data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="label_share"):
        do(*words(data, tmp_path / "x", shares="0.5,2"))
    unclear = words(data, tmp_path / "x", shares="half")
    assert CliRunner().invoke(app, [str(word) for word in unclear]).exit_code == 2


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a_1_0.json").write_text('{"method": "a"}')
    with pytest.raises(DataError, match=r"a_1_0\.json.*done again"):
        experiment.read_cells(tmp_path, ["a"])
