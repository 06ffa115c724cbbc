"""One self-contained HTML page about a set of runs: scores, pictures, curves, steps, settings.

`render_report` is a function of its data alone: the same data gives the same bytes, nothing is fetched, everything shown is
escaped. The page's style sheet and its small 3-D viewer stand beside this file as `page.css` and `viewer.js`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from picture3d.files import write_text
from picture3d.view import curves
from picture3d.view.colors import class_colors, ramp_table
from picture3d.view.experiment_section import experiment_sections
from picture3d.view.figures import Figure, background_css, hero_picture, scene_figures
from picture3d.view.heat_map import HeatMap, heat_map_svg
from picture3d.view.pictures import data_uri, webp_bytes
from picture3d.view.report_data import CurveGroup, ReportData, RunScores, Step, is_known
from picture3d.view.scene_modes import Legend, Mode, hex_color, readable, scene_modes
from picture3d.view.viewer import viewer_json

# (light, dark) per run; told apart by colour-blind readers, too (after Okabe and Ito). The first is the plain one.
_NAMED = {"scratch": ("#7b8590", "#98a3af"), "coordinates": ("#0072b2", "#5fb4ea"), "picture": ("#d55e00", "#ff9a4d")}
_OTHERS = (("#009e73", "#3fcfa4"), ("#a5528a", "#e093c4"), ("#8a6d00", "#e3c64a"), ("#4455aa", "#98a6ff"))

_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_METRICS = {
    "total": "total loss",
    "coordinates": "hidden points (Chamfer, m²)",
    "features": "teacher's features (Smooth-L1)",
    "visible_features": "teacher's features of visible voxels (Smooth-L1)",
    "hidden_share": "share of voxels hidden",
    "cross_entropy": "cross entropy",
    "semantic": "precision, recall, specificity of classes",
    "geometric": "the same of being occupied",
    "lovasz": "Lovász loss",
    "accuracy": "share of points right",
    "lr": "learning rate",
}
_LOSSES = {"total", "coordinates", "features", "visible_features", "cross_entropy"}


def render_report(data: ReportData, path: Path) -> Path:
    """Writes the page to `path`, whole or not at all.

    Raises:
        DataError: if the file cannot be written.
    """
    write_text(path, report_html(data))
    return path


def report_html(data: ReportData) -> str:
    """The page as text."""
    shown = [(scene, scene_modes(scene, data.class_names)) for scene in data.scenes if len(scene.xyz)]
    colors = run_colors(data)
    pictures = [
        _figures(scene.name, scene_figures(scene, modes, data.class_names, brief=i > 0), i, len(shown))
        for i, (scene, modes) in enumerate(shown)
    ]
    sections = [
        *(_section(*found) for found in (experiment_sections(data.experiment, colors) if data.experiment else ())),
        _section("Scores", _scores(data, colors)),
        *(_section("" if i else "Pictures", body) for i, body in enumerate(pictures)),
        _section("Training", "".join(_curve_group(group, colors) for group in data.curves)),
        _section("Encoders compared", _comparisons(data.comparisons)),
        _section("What was run", _steps(data.steps)),
        _section("Read with care", _notes(data.notes)),
        _section("Machine and settings", _environment(data.environment) + _configs(data.configs)),
    ]
    viewer = _viewer(data, shown)
    script = f"<script>{_resource('viewer.js')}</script>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{escape(data.title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n:root{{--night:{background_css()};--ramp:{_ramp_css()}}}\n{_run_css(colors)}\n{_resource('page.css')}</style>\n"
        "</head>\n<body>\n"
        f'<header class="night"><div class="wide head"><h1>{escape(data.title)}</h1>{_paragraphs(data.summary, "lede")}</div>'
        f"{viewer}</header>\n<main>\n{''.join(sections)}</main>\n"
        '<footer class="wide">Written by picture3d. This page is one file and asks nothing of the network.</footer>\n'
        f"{script}\n</body>\n</html>\n"
    )


def run_colors(data: ReportData) -> dict[str, str]:
    """Run -> the CSS variable of its colour, the same everywhere on the page."""
    runs: dict[str, None] = dict.fromkeys([*(data.experiment.methods if data.experiment else ()), *data.scores])
    for group in data.curves:
        runs |= dict.fromkeys(group.runs)
    for scene in data.scenes:
        runs |= dict.fromkeys([*scene.predictions, *scene.encoder_colors])
    return {run: f"var(--run-{i})" for i, run in enumerate(runs)}


# Sections ----------------------------------------------------------------------------------------------------------------


def _scores(data: ReportData, colors: Mapping[str, str]) -> str:
    if not data.scores:
        return ""
    first, base = next(iter(data.scores.items()))
    rows = []
    for run, score in data.scores.items():
        difference = "" if run == first else _difference(score.miou, base.miou)
        rows.append(
            f'<tr><th scope="row"><span class="dot" style="background:{colors[run]}"></span>{escape(run)}'
            f'<small>{escape(score.detail)}</small></th><td class="barcell">{curves.bar(score.miou, colors[run])}</td>'
            f'<td class="num big">{_percent(score.miou)}</td><td class="num">{difference}</td></tr>'
        )
    return (
        _verdict(data.scores) + '<table class="scores"><thead><tr><th scope="col">run</th><th scope="col" class="barcell"></th>'
        '<th scope="col" class="num">mIoU, %</th>'
        f'<th scope="col" class="num">against {escape(first)}</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        + _class_table(data, colors)
    )


def _verdict(scores: Mapping[str, RunScores]) -> str:
    """One sentence a newcomer can take away; said of the numbers, not of the method."""
    known = {run: score.miou for run, score in scores.items() if score.miou is not None and is_known(score.miou)}
    first = next(iter(scores))
    if len(known) < 2 or first not in known:
        return ""
    best = max(known, key=lambda run: known[run])
    if best == first:
        return f'<p class="verdict">Here <b>{escape(first)}</b> scores highest, with {_percent(known[first])}% mean IoU.</p>'
    return (
        f'<p class="verdict"><b>{escape(best)}</b> scores highest: {_percent(known[best])}% mean IoU, '
        f"{100 * (known[best] - known[first]):.1f} points above {escape(first)}.</p>"
    )


def _class_table(data: ReportData, colors: Mapping[str, str]) -> str:
    scores = data.scores
    names = list(dict.fromkeys(name for score in scores.values() for name in score.iou))
    if not names:
        return ""
    points = next((score.points for score in scores.values() if score.points), {})
    swatch = {name: hex_color(row) for name, row in zip(data.class_names, class_colors(data.class_names), strict=True)}
    head = "".join(
        f'<th scope="col" class="num"><span class="dot" style="background:{colors[run]}"></span>{escape(run)}</th>'
        for run in scores
    )
    body = []
    for name in names:
        values = [score.iou.get(name) for score in scores.values()]
        best = max((v for v in values if v is not None and is_known(v)), default=None)
        cells = "".join(
            f'<td class="num{" best" if v is not None and v == best and v > 0 else ""}">{_percent(v)}</td>' for v in values
        )
        count = f'<td class="num points">{points[name]:,}</td>' if name in points else '<td class="num points">–</td>'
        strip = curves.dots([(v, colors[run]) for v, run in zip(values, scores, strict=True)])
        body.append(
            f'<tr><th scope="row"><span class="swatch" style="background:{swatch.get(name, "transparent")}"></span>'
            f"{escape(readable(name))}</th>{count if points else ''}"
            f'<td class="dotcell">{strip}</td>{cells}</tr>'
        )
    counted = '<th scope="col" class="num points">true points</th>' if points else ""
    return (
        "<h3>Class by class</h3><p>Intersection over union in per cent: of all points that either are or were called a class, "
        "how many are both. A class that occurs in neither truth nor prediction has no number (–) and is left out of the mean."
        '</p><div class="scroll"><table class="classes"><thead><tr><th scope="col">class</th>'
        f'{counted}<th scope="col" class="dotcell"><span class="axis"><i>0</i><i>50</i><i>100</i></span></th>{head}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _viewer(data: ReportData, shown: Sequence[tuple[Any, Mapping[str, Mode]]]) -> str:
    if not shown:
        return ""
    still = data_uri(webp_bytes(hero_picture(*shown[0]), 80))
    return (
        '<div id="viewer" class="viewer"><div class="stage">'
        f'<img class="still" alt="A LiDAR sweep in perspective" src="{still}"></div>'
        '<div class="wide controls"></div></div>'
        f'<script type="application/json" id="scenes">{viewer_json(shown)}</script>'
    )


def _figures(scene_name: str, figures: Sequence[Figure], index: int, total: int) -> str:
    heading = f"<h3>{escape(scene_name)}</h3>" if total > 1 else ""
    return heading + "".join(
        _figure(figure, f"{index + 1}.{i + 1}" if total > 1 else f"{i + 1}") for i, figure in enumerate(figures)
    )


def _figure(figure: Figure, number: str) -> str:
    panels = "".join(
        f'<div class="panel"><img loading="lazy" width="{panel.image.width}" height="{panel.image.height}" '
        f'alt="{escape(figure.title)}: {escape(panel.label)}" src="{data_uri(webp_bytes(panel.image, 78))}">'
        f"<span>{escape(panel.label)}</span></div>"
        for panel in figure.panels
    )
    square = all(panel.image.width == panel.image.height for panel in figure.panels)
    kind = "panels" + (" square" if square else "") + (" many" if square and len(figure.panels) > 2 else "")
    return (
        f'<figure><div class="{kind}" style="--columns:{figure.columns}">{panels}</div>{_legend(figure.legend)}'
        f"<figcaption><b>Figure {number}. {escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>"
    )


def _legend(legend: Legend) -> str:
    if not legend:
        return ""
    items = "".join(f'<li><i style="background:{hex_color(color)}"></i>{escape(name)}</li>' for name, color in legend)
    return f'<ul class="legend">{items}</ul>'


def _curve_group(group: CurveGroup, colors: Mapping[str, str]) -> str:
    found = dict.fromkeys(metric for run in group.runs.values() for metric in run)
    metrics = [m for m in _METRICS if m in found] + [m for m in found if m not in _METRICS]
    charts = []
    for metric in metrics:
        lines = {run: (by[metric].steps, by[metric].values) for run, by in group.runs.items() if metric in by}
        log = group.log or (metric in _LOSSES and curves.spans_decades(lines))
        title = _METRICS.get(metric, readable(metric)) + (", logarithmic" if log else "")
        chart = curves.line_chart(lines, colors=colors, title=f"{group.title}: {title}", log=log)
        if chart:
            charts.append(f'<div class="chartbox"><h4>{escape(title)}</h4>{chart}</div>')
    if not charts:
        return ""
    key = "".join(f'<li><i style="background:{colors[run]}"></i>{escape(run)}</li>' for run in group.runs)
    text = f"<p>{escape(group.text)}</p>" if group.text else ""
    columns = 2 if len(charts) in {1, 2, 4} else 3
    grid = f'<div class="charts" style="--columns:{columns}">{"".join(charts)}</div>'
    return f'<h3>{escape(group.title)}</h3>{text}<ul class="legend">{key}</ul>{grid}'


def _comparisons(maps: Sequence[HeatMap]) -> str:
    if not maps:
        return ""
    figures = "".join(f"<figure>{heat_map_svg(heat)}<figcaption>{escape(heat.title)}.</figcaption></figure>" for heat in maps)
    return (
        "<p>How far the layers of two encoders say the same of the voxels of a few sweeps: 1 is the same up to rotation and "
        "scale, 0 nothing in common. Layers are named by stage, block and half of the block, and grow deeper upwards and to "
        f"the right; on the diagonal a layer meets its own place in the other encoder.</p>{figures}"
    )


def _steps(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    total = sum(step.seconds for step in steps if step.seconds is not None and is_known(step.seconds))
    rows, start = [], 0.0
    for step in steps:
        seconds = step.seconds if step.seconds is not None and is_known(step.seconds) else None
        track = ""
        if total > 0:
            left, width = 100 * start / total, 100 * (seconds or 0) / total
            track = f'<span class="track"><i style="left:{left:.2f}%;width:{width:.2f}%"></i></span>'
        start += seconds or 0
        command = f'<pre class="command"><code>{escape(_shell_lines(step.command))}</code></pre>' if step.command else ""
        detail = f"<small>{escape(step.detail)}</small>" if step.detail else ""
        rows.append(
            f'<li><div class="step"><span class="name">{escape(step.name)}{detail}</span>{track}'
            f'<span class="num">{_seconds(seconds)}</span></div>{command}</li>'
        )
    repeat = " Every step is a command of its own; type it again to repeat it." if any(s.command for s in steps) else ""
    said = f"<p>{_seconds(total)} in all.{repeat}</p>" if total else ""
    return f'{said}<ol class="steps">{"".join(rows)}</ol>'


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _environment(environment: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{escape(readable(str(key)))}</dt><dd>{escape('–' if value is None else str(value))}</dd></div>"
        for key, value in environment.items()
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _configs(configs: Mapping[str, Any]) -> str:
    return "".join(
        f"<details><summary>{escape(name)}</summary><pre><code>{escape(json.dumps(tree, indent=2, default=str))}</code></pre>"
        "</details>"
        for name, tree in configs.items()
    )


# Small things --------------------------------------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    if not body:
        return ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section class="wide"><div class="margin">{head}</div><div class="body">{body}</div></section>\n'


def _paragraphs(text: str, kind: str) -> str:
    return "".join(f'<p class="{kind}">{escape(part.strip())}</p>' for part in text.split("\n\n") if part.strip())


def _percent(share: float | None) -> str:
    return f"{100 * share:.1f}" if share is not None and is_known(share) else "–"


def _difference(value: float | None, base: float | None) -> str:
    if value is None or base is None or not (is_known(value) and is_known(base)):
        return "–"
    return f"{100 * (value - base):+.1f}".replace("-", "−")


def _shell_lines(command: str, width: int = 96) -> str:
    """A long command, continued on further lines before its options; it can be pasted as it stands."""
    if len(command) <= width:
        return command
    first, *options = command.split(" --")
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) + 3 <= width:
            lines[-1] += f" --{option}"
        else:
            lines.append(f"    --{option}")
    return " \\\n".join(lines)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _run_css(colors: Mapping[str, str]) -> str:
    others = iter(range(len(colors)))
    pairs = [_NAMED.get(run.removeprefix("town-")) or _OTHERS[next(others) % len(_OTHERS)] for run in colors]
    light = "".join(f"--run-{i}:{pair[0]};" for i, pair in enumerate(pairs))
    dark = "".join(f"--run-{i}:{pair[1]};" for i, pair in enumerate(pairs))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _ramp_css() -> str:
    return f"linear-gradient(90deg,{','.join(hex_color(color) for color in ramp_table(9))})"


def _resource(name: str) -> str:
    return files("picture3d.view").joinpath(name).read_text("utf-8")
