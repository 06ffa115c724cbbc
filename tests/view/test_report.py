import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from picture3d.errors import DataError
from picture3d.evaluation.segmentation import ConfusionMatrix
from picture3d.view.figures import overview_picture, scene_figures
from picture3d.view.report import render_report, report_html
from picture3d.view.report_data import (
    LIDARSEG_CLASSES,
    Curve,
    CurveGroup,
    ReportData,
    RunScores,
    SceneView,
    Step,
    curves_from_records,
)
from picture3d.view.scene_modes import scene_modes

RUNS = ("scratch", "coordinates", "picture")
IOU = {"car": 0.5, "bus": None, "truck": float("nan")}
EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link", "img", "br", "input", "line", "rect", "circle", "polyline"}


def make_scene(name: str = "a street", points: int = 400) -> SceneView:
    rng = np.random.default_rng(3)
    xyz = (rng.normal(size=(points, 3)) * (15, 15, 1)).astype(np.float32)
    labels = rng.integers(0, 17, points)
    return SceneView(
        name,
        xyz,
        intensity=rng.random(points).astype(np.float32),
        labels=labels,
        predictions={run: np.where(rng.random(points) < 0.5, labels, 4) for run in RUNS},
        teacher_colors=rng.integers(0, 256, (points, 3), dtype=np.uint8),
        superclass=rng.integers(-1, 8, points),
        hidden=rng.random(points) < 0.5,
        rebuilt_m=rng.normal(size=(100, 3)).astype(np.float32) * 10,
        encoder_colors={run: rng.integers(0, 256, (points, 3), dtype=np.uint8) for run in RUNS[1:]},
    )


def make_data() -> ReportData:
    curve = Curve(np.arange(5.0), np.array([3.0, 2.0, np.nan, 1.0, 0.5]))
    return ReportData(
        title="A run",
        summary="First paragraph.\n\nSecond paragraph.",
        scores={run: RunScores(0.3 + 0.05 * i, dict(IOU), {"car": 12345}) for i, run in enumerate(RUNS)},
        scenes=[make_scene()],
        curves=[CurveGroup("Pre-training", {"picture": {"total": curve}, "coordinates": {"total": curve}})],
        steps=[Step("synth", "picture3d synth raw", 31.0), Step("late", "", None)],
        notes=["One seed."],
        environment={"python": "3.12", "cuda": None},
        configs={"pretrain": {"training": {"batch_size": 4}}},
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects elements and complains about tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(make_data())


def test_the_page_is_well_formed_and_says_what_was_scored(page: str):
    text = " ".join(read(page).text)
    for expected in (
        "A run",
        "First paragraph.",
        "35.0",
        "40.0",
        "+10.0",
        "picture3d synth raw",
        "One seed.",
        "12,345",
        "3.12",
    ):
        assert expected in text
    assert "picture scores highest: 40.0% mean IoU, 10.0 points above scratch." in "".join(read(page).text)


def test_the_page_loads_nothing_from_anywhere(page: str):
    for tag, attributes in read(page).elements:
        assert tag not in {"iframe", "object", "embed", "audio", "video", "base"}
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), f"<{tag} {name}>"
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|\bimport\(", page)
    assert "default-src 'none'" in page


def test_every_picture_on_the_page_can_be_opened_and_has_words(page: str):
    images = [attributes for tag, attributes in read(page).elements if tag == "img"]
    assert len(images) >= 12
    for image in images:
        Image.open(io.BytesIO(base64.b64decode((image["src"] or "").partition(",")[2]))).verify()
        assert image["alt"]


def test_everything_shown_is_escaped():
    black = np.zeros((400, 3), np.uint8)
    data = ReportData(
        title=EVIL,
        summary=EVIL,
        scores={EVIL: RunScores(0.1, {EVIL: 0.2}, {EVIL: 3}, EVIL), "b": RunScores(0.2)},
        scenes=[replace(make_scene(EVIL), predictions={EVIL: np.ones(400, np.int64)}, encoder_colors={EVIL: black})],
        curves=[CurveGroup(EVIL, {EVIL: {EVIL: Curve(np.arange(3.0), np.arange(3.0))}}, EVIL)],
        steps=[Step(EVIL, EVIL, 1.0, EVIL)],
        notes=[EVIL],
        environment={EVIL: EVIL},
        configs={EVIL: {EVIL: EVIL}},
        class_names=("ignored", *(EVIL + str(i) for i in range(16))),
    )  # fmt: skip
    page = report_html(data)
    assert "<script>alert" not in page
    assert [tag for tag, _ in read(page).elements].count("script") == 2, "the scenes and the viewer, nothing else"


def test_the_same_data_gives_the_same_bytes(tmp_path: Path, page: str):
    first = render_report(make_data(), tmp_path / "a" / "report.html")
    assert first.read_text("utf-8") == page
    assert [p.name for p in first.parent.iterdir()] == ["report.html"], "no temporary file stays behind"


def test_a_page_of_nothing_is_still_a_page():
    page = report_html(ReportData(title="empty"))
    reader = read(page)
    assert "<h1>empty</h1>" in page
    assert not [tag for tag, _ in reader.elements if tag in {"img", "table", "canvas", "section", "svg"}]


PARTS = ("summary", "scores", "scenes", "curves", "steps", "notes", "environment", "configs")


@pytest.mark.parametrize("part", PARTS)
def test_any_single_part_stands_alone(part: str):
    read(report_html(ReportData(title="one part", **{part: getattr(make_data(), part)})))


def test_missing_numbers_are_dashes():
    page = report_html(
        ReportData(
            title="t", scores={"scratch": RunScores(float("nan"), {"car": None}), "b": RunScores(None), "c": RunScores(0.5)}
        )
    )
    assert "nan" not in "".join(read(page).text).lower().replace("none", "")
    assert page.count("–</td>") >= 5
    assert "scores highest" not in page, "there is nothing to compare with"


def test_a_run_below_the_first_gets_a_minus():
    page = report_html(ReportData(title="t", scores={"scratch": RunScores(0.5), "b": RunScores(0.42)}))
    assert "−8.0" in page
    assert "<b>scratch</b> scores highest" in page


@pytest.mark.parametrize(
    "left_out", ["intensity", "labels", "teacher_colors", "superclass", "hidden", "rebuilt_m", "predictions", "encoder_colors"]
)
def test_a_scene_may_lack_any_of_its_columns(left_out: str):
    empty = {} if left_out in {"predictions", "encoder_colors"} else None
    scene = replace(make_scene(), **{left_out: empty})
    read(report_html(ReportData(title="t", scenes=[scene])))


@pytest.mark.parametrize("points", [0, 1])
def test_scenes_of_no_or_one_point(points: int):
    read(report_html(ReportData(title="t", scenes=[make_scene(points=points)])))


def test_a_scene_with_points_that_are_not_finite():
    scene = make_scene()
    xyz = scene.xyz.copy()
    xyz[:7] = np.nan
    xyz[7] = np.inf
    read(report_html(ReportData(title="t", scenes=[replace(scene, xyz=xyz)])))


def test_a_scene_refuses_columns_of_another_length():
    with pytest.raises(ValueError, match=r"predictions\[picture\] has 3 rows for 400 points"):
        replace(make_scene(), predictions={"picture": np.zeros(3, int)})


def test_several_scenes_are_numbered_and_named():
    page = report_html(ReportData(title="t", scenes=[make_scene("first town"), make_scene("second town")]))
    assert "Figure 1.1." in page
    assert "Figure 2.1." in page
    assert "second town" in page


def test_the_viewer_gets_back_the_positions_and_colours_it_was_given():
    scene = make_scene()
    modes = scene_modes(scene, LIDARSEG_CLASSES)
    page = report_html(ReportData(title="t", scenes=[scene]))
    found = re.search(r'<script type="application/json" id="scenes">(.*?)</script>', page, re.DOTALL)
    assert found
    (tree,) = json.loads(found[1])
    near = (np.abs(scene.xyz) < 75).all(1)
    xyz = np.frombuffer(base64.b64decode(tree["xyz"]), "<i2").reshape(-1, 3) / 32767 * tree["range"]
    np.testing.assert_allclose(xyz, scene.xyz[near], atol=80 / 32767)
    assert [mode["key"] for mode in tree["modes"]] == list(modes)
    for mode in tree["modes"]:
        palette = np.frombuffer(base64.b64decode(mode["palette"]), np.uint8).reshape(-1, 3).astype(int)
        shown = palette[np.frombuffer(base64.b64decode(mode["index"]), np.uint8)]
        wanted = modes[mode["key"]].colors[near].astype(int)
        few = len(np.unique(wanted, axis=0)) <= 256
        assert np.abs(shown - wanted).max() <= (0 if few else 48), mode["key"]  # many colours share 256 places


def test_scores_are_read_from_the_tree_that_evaluation_writes():
    confusion = ConfusionMatrix(LIDARSEG_CLASSES)
    confusion.add(np.array([4, 4, 11, 0]), np.array([4, 3, 11, 5]))
    scores = RunScores.from_tree(json.loads(json.dumps(confusion.scores().to_json())), detail="from scratch")
    assert scores.iou["car"] == 0.5
    assert scores.points["car"] == 2
    assert scores.points["driveable_surface"] == 1
    assert scores.iou["vegetation"] is None
    assert scores.miou == pytest.approx(0.5)
    assert RunScores.from_tree({"miou": 0.25}).miou == 0.25


def test_curves_come_from_the_lines_of_a_metrics_file():
    records = [{"step": 10, "epoch": 0, "total": 2.0, "seconds": 1}, {"step": 20, "total": 1.0, "note": "x"}, {"total": 9}]
    curves = curves_from_records(records)
    assert list(curves) == ["total"]
    np.testing.assert_array_equal(curves["total"].steps, [10, 20])
    np.testing.assert_array_equal(curves["total"].values, [2, 1])
    assert curves_from_records(records, ["features"]) == {}


def test_wherever_the_sensor_looks_the_car_looks_up():
    scene = make_scene()
    x_ahead = scene.xyz[:, [1, 0, 2]] * np.array([1, -1, 1], np.float32)
    turned = replace(scene, xyz=x_ahead, heading_deg=0.0)
    seen = [scene_figures(s, scene_modes(s, LIDARSEG_CLASSES), LIDARSEG_CLASSES) for s in (scene, turned)]
    from_above = [[panel for figure in figures for panel in figure.panels if panel.label.startswith("by ")] for figures in seen]
    assert len(from_above[0]) == len(from_above[1]) > 1
    for one, other in zip(*from_above, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_an_overview_shows_the_method_in_six_panels():
    scene = make_scene()
    picture = overview_picture(scene, scene_modes(scene, LIDARSEG_CLASSES))
    assert picture.size[0] > 3 * 620
    assert picture.size[1] > 2 * 370


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"report\.html: cannot be written"):
        render_report(ReportData(title="t"), tmp_path / "file" / "report.html")
