"""What a label-efficiency experiment found, as sections of the report: the verdict, the curve, the table, classes, encoders."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from picture3d.evaluation.label_efficiency import Estimate
from picture3d.view import curves
from picture3d.view.report_data import ExperimentView
from picture3d.view.scene_modes import readable

_IN_WORDS = {
    "mIoU": "Mean intersection over union",
    "mAP": "Mean average precision",
    "mAPH": "Mean average precision weighted by heading",
}


def experiment_sections(view: ExperimentView, colors: Mapping[str, str]) -> list[tuple[str, str]]:
    """(title, body) of each section, in the order of the page; nothing for an experiment without a cell.

    Args:
        view: what was found.
        colors: method to CSS colour.
    """
    if not view.rows:
        return []
    found = [
        ("Label efficiency", _verdict(view) + _curve(view, colors) + _table(view, colors)),
        ("Frozen encoders", _encoders(view, colors)),
        ("Class by class", _classes(view, colors)),
        ("Cost", _cost(view, colors)),
        ("Every cell", _cells(view)),
    ]
    return [(title, body) for title, body in found if body]


def efficiency_chart(view: ExperimentView, colors: Mapping[str, str], *, size: tuple[int, int] = (560, 300)) -> str:
    """Mean score in per cent over the labelled keyframes, a line per method, a bar for each 95 % interval; an ``<svg>``."""
    of = {method: [row for row in view.rows if row.method == method] for method in view.methods}
    lines = {m: ([view.frames[r.share] for r in rows], [100 * r.score.mean for r in rows]) for m, rows in of.items()}
    whiskers = {
        m: (
            [view.frames[r.share] for r in rows],
            [100 * (r.score.mean - _or_nan(r.score.interval)) for r in rows],
            [100 * (r.score.mean + _or_nan(r.score.interval)) for r in rows],
        )
        for m, rows in of.items()
    }
    title = f"{view.measure} in per cent over the number of labelled keyframes"
    return curves.line_chart(
        lines, colors=colors, title=title, x_label="labelled keyframes", log_x=True, whiskers=whiskers, size=size
    )


def _verdict(view: ExperimentView) -> str:
    """One sentence on the least share: the greatest gain, and whether its interval tells it from 0."""
    share = view.rows[0].share
    gains = [(row.gain.mean, row) for row in view.rows if row.share == share and row.gain is not None]
    if not gains:
        return ""
    _, row = max(gains, key=lambda found: found[0])
    assert row.gain is not None
    first, frames = view.methods[0], view.frames[share]
    gained = f"{_signed(row.gain.mean)} points"
    if row.gain.interval is None:
        certain = "One seed: another may turn it round."
    elif abs(row.gain.mean) > row.gain.interval:
        certain = (
            f"Over {row.gain.seeds} seeds the 95 % interval of that gain is ±{100 * row.gain.interval:.1f}, so it is not 0."
        )
    else:
        certain = (
            f"Over {row.gain.seeds} seeds its 95 % interval is ±{100 * row.gain.interval:.1f}, which does not tell it from 0."
        )
    return (
        f'<p class="verdict">On {frames} labelled keyframes <b>{escape(row.method)}</b> stands best against '
        f"{escape(first)}: {gained}. {certain}</p>"
    )


def _curve(view: ExperimentView, colors: Mapping[str, str]) -> str:
    if len(view.frames) < 2:  # one point is no curve: the table says it
        return ""
    key = "".join(f'<li><i style="background:{colors[method]}"></i>{escape(method)}</li>' for method in view.methods)
    bars = "Bars are 95 % intervals of the mean. " if any(row.score.interval is not None for row in view.rows) else ""
    return (
        f'<figure><div class="experiment">{efficiency_chart(view, colors)}</div><ul class="legend">{key}</ul>'
        f"<figcaption>{view.measure}, per cent, of fine-tuned networks on scenes that no training saw. {bars}"
        "The axis of keyframes is logarithmic.</figcaption></figure>"
    )


def _table(view: ExperimentView, colors: Mapping[str, str]) -> str:
    heads = (f"{view.measure}, %", "95 %", "spread", f"against {view.methods[0]}", "95 %")
    head = "".join(f'<th scope="col" class="num">{escape(text)}</th>' for text in heads)
    head += '<th scope="col" class="num points">seeds</th>'
    body = []
    for share in dict.fromkeys(row.share for row in view.rows):
        frames = view.frames[share]
        body.append(
            f'<tr><th colspan="7" scope="rowgroup" class="share">{_share(share)} of the labels, {frames} keyframes</th></tr>'
        )
        rows = [row for row in view.rows if row.share == share]
        best = max(row.score.mean for row in rows)
        for row in rows:
            mark = " best" if row.score.mean == best else ""
            cells = [
                f'<td class="num{mark}">{100 * row.score.mean:.1f}</td>',
                f'<td class="num">{_within(row.score)}</td>',
                f'<td class="num">{_plain(row.score.spread)}</td>',
                f'<td class="num">{"" if row.gain is None else _signed(row.gain.mean)}</td>',
                f'<td class="num">{"" if row.gain is None else _within(row.gain)}</td>',
                f'<td class="num points">{row.score.seeds}</td>',
            ]
            body.append(f"<tr>{_name(row.method, colors)}{''.join(cells)}</tr>")
    return (
        '<div class="scroll"><table class="classes efficiency"><thead><tr><th scope="col">method</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p><small>{_IN_WORDS.get(view.measure, view.measure)}, per cent. Spread: standard deviation over seeds. A gain is "
        "the mean over seeds of the difference of two cells that share their seed, and so their labelled scenes and the first "
        "weights of the head; its interval is that of these differences.</small></p>"
    )


def _encoders(view: ExperimentView, colors: Mapping[str, str]) -> str:
    if not view.encoders:
        return ""
    rows = "".join(
        f'<tr>{_name(e.method, colors)}<td class="num">{_plain(e.linear)}</td><td class="num">{_plain(e.neighbours)}</td>'
        f'<td class="num">{"–" if e.rank is None else f"{e.rank:.1f}"}</td><td class="num points">{e.seeds}</td></tr>'
        for e in view.encoders
    )
    return (
        "<p>Nothing is trained here but a reading of the features as pre-training left them: one linear layer, and the nearest "
        "labelled voxels. The effective rank says how many directions the features use.</p>"
        '<div class="scroll"><table class="classes"><thead><tr><th scope="col">encoder of</th>'
        '<th scope="col" class="num">linear mIoU, %</th><th scope="col" class="num">kNN mIoU, %</th>'
        '<th scope="col" class="num">rank</th>'
        f'<th scope="col" class="num points">seeds</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _classes(view: ExperimentView, colors: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(name for by in view.by_class.values() for name in by))
    if not names:
        return ""
    methods = [method for method in view.methods if method in view.by_class]
    head = "".join(
        f'<th scope="col" class="num"><span class="dot" style="background:{colors[m]}"></span>{escape(m)}</th>' for m in methods
    )
    body = []
    for name in names:
        values = [view.by_class[method].get(name) for method in methods]
        best = max((value for value in values if value is not None), default=0.0)
        cells = "".join(f'<td class="num{" best" if v is not None and v == best > 0 else ""}">{_plain(v)}</td>' for v in values)
        strip = curves.dots([(value, colors[method]) for value, method in zip(values, methods, strict=True)])
        body.append(f'<tr><th scope="row">{escape(readable(name))}</th><td class="dotcell">{strip}</td>{cells}</tr>')
    return (
        f"<p>Mean over seeds, {_share(view.rows[0].share)} of the labels.</p>"
        '<div class="scroll"><table class="classes"><thead><tr><th scope="col">class</th><th scope="col" class="dotcell">'
        f'<span class="axis"><i>0</i><i>50</i><i>100</i></span></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cost(view: ExperimentView, colors: Mapping[str, str]) -> str:
    if not view.seconds:
        return ""
    rows = "".join(
        f'<tr>{_name(method, colors)}<td class="num">{_whole(before)}</td><td class="num">{_whole(after)}</td></tr>'
        for method, (before, after) in view.seconds.items()
    )
    return (
        "<p>Mean seconds of one training by the clock. One pre-training serves all shares of a seed.</p>"
        '<div class="scroll"><table class="classes"><thead><tr><th scope="col">method</th>'
        '<th scope="col" class="num">pre-training</th>'
        f'<th scope="col" class="num">fine-tuning</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _cells(view: ExperimentView) -> str:
    if not view.cells:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(method)}</th><td class="num">{_share(share)}</td><td class="num">{seed}</td>'
        f'<td class="num">{100 * score:.1f}</td><td class="num">{seconds:.0f}</td></tr>'
        for method, share, seed, score, seconds in view.cells
    )
    return (
        f'<details><summary>{len(view.cells)} fine-tunings</summary><div class="scroll"><table class="classes"><thead><tr>'
        '<th scope="col">method</th><th scope="col" class="num">labels</th><th scope="col" class="num">seed</th>'
        f'<th scope="col" class="num">{view.measure}, %</th><th scope="col" class="num">seconds</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _name(method: str, colors: Mapping[str, str]) -> str:
    return (
        f'<th scope="row"><span class="swatch" style="background:{colors.get(method, "transparent")}"></span>'
        f"{escape(method)}</th>"
    )


def _share(share: float) -> str:
    """1, 1/4, 1/16, or a number of per cent."""
    if share == 1:
        return "all"
    parts = round(1 / share)
    return f"1/{parts}" if abs(share * parts - 1) < 1e-9 else f"{100 * share:.3g} %"


def _within(estimate: Estimate) -> str:
    return "–" if estimate.interval is None else f"±{100 * estimate.interval:.1f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
