"""`check` and `data info`: is the data sound, and what is in it?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from picture3d.datasets.check import CheckReport, Finding, Tally, check_prepared
from picture3d.datasets.check_argoverse2 import check_raw_argoverse2, is_raw_argoverse2
from picture3d.datasets.check_nuscenes import check_raw_nuscenes, is_raw_nuscenes
from picture3d.datasets.check_occupancy import with_occupancy
from picture3d.datasets.check_once import check_raw_once, is_raw_once
from picture3d.datasets.check_points import check_raw_points, is_raw_points
from picture3d.datasets.check_semantickitti import check_raw_semantickitti, is_raw_semantickitti
from picture3d.datasets.check_waymo import check_raw_waymo, check_raw_waymo_v2
from picture3d.datasets.object_database import databases_of
from picture3d.datasets.occupancy_store import OccupancyStore, has_occupancy
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.waymo_v2 import waymo_version
from picture3d.errors import DataError
from picture3d.files import whole_file
from picture3d.formats.remote import remote_url
from picture3d.structures.frame import Frame
from picture3d.training.runlog import Progress

_FINDINGS_SHOWN = 5  # of one kind
_SAMPLED = 64  # keyframes from which classes and categories are counted
_Item = TypeVar("_Item")


def check(folder: Path, *, as_json: bool, layout: str = "x,y,z,intensity") -> tuple[str, bool]:
    """Checks prepared or raw data; returns what to tell the user and whether the data is sound.

    Args:
        folder: what to look at; its kind is seen from its files.
        as_json: tell it as JSON.
        layout: columns of the user's own ``.bin`` and ``.npy`` sweeps.

    Raises:
        DataError: if the folder holds neither prepared frames nor raw data of a known kind.
    """
    with Progress("check", unit="frames") as progress:
        if remote_url(folder) is not None or (folder / "dataset.json").exists():
            report = with_occupancy(check_prepared(folder, progress=progress))
        elif is_raw_nuscenes(folder):
            report = check_raw_nuscenes(folder, progress=progress)
        elif version := waymo_version(folder):
            report = (check_raw_waymo if version == 1 else check_raw_waymo_v2)(folder, progress=progress)
        elif is_raw_once(folder):
            report = check_raw_once(folder, progress=progress)
        elif is_raw_argoverse2(folder):
            report = check_raw_argoverse2(folder, progress=progress)
        elif is_raw_semantickitti(folder):
            report = check_raw_semantickitti(folder, progress=progress)
        elif is_raw_points(folder):
            report = check_raw_points(folder, layout=layout, progress=progress)
        else:
            raise DataError(
                f"{folder}: neither prepared frames (no dataset.json) nor raw nuScenes (no v1.0-*/scene.json) nor raw Waymo "
                "(no tfrecord or lidar/*.parquet in training/, validation/, testing/ or raw_data/) nor ONCE (no "
                "data/<sequence>/) nor Argoverse 2 (no log with sensors/lidar/) nor SemanticKITTI (no sequences/*/velodyne/) "
                "nor sweeps (.bin .pcd .npy .ply). Name the folder that holds one of these."
            )
    return (json.dumps(report.to_json()) if as_json else _check_text(report)), report.sound


def data_info(folder: Path, *, as_json: bool, picture: Path | None, frame: int) -> str:
    """What a prepared dataset holds, from its index and, for classes and categories, a sample of its keyframes.

    Args:
        folder: prepared frames; of a URL the index alone is looked at, for logs would have to be fetched.
        as_json: tell it as JSON.
        picture: where one keyframe is drawn, the car looking up.
        frame: which keyframe that is, counted over all logs.

    Raises:
        DataError: if the folder is not a prepared dataset, or has no such keyframe.
    """
    dataset = PreparedDataset(folder)
    logs = dataset.logs()
    summaries = [dataset.summary(log) for log in logs]
    stores = sorted(path.name for path in (folder / "targets").iterdir()) if (folder / "targets").is_dir() else []
    info = {
        "root": str(folder),
        "name": dataset.name,
        "label_set": None if dataset.label_set is None else dataset.label_set.name,
        "logs": len(logs),
        "splits": {split: len(dataset.logs(split)) for split in dataset.splits},
        "frames": sum(s.frames for s in summaries),
        "keyframes": sum(len(s.keyframes) for s in summaries),
        "labelled_frames": sum(s.labelled for s in summaries),
        "points": sum(s.points for s in summaries),
        "boxes": sum(s.boxes for s in summaries),
        "bytes": sum(s.bytes for s in summaries),
        **({} if remote_url(folder) is not None else _sampled(dataset)),
        "targets": stores,
        "objects": databases_of(folder),
        "occupancy": _occupancy(folder),
    }
    if picture is not None:
        keys = dataset.keyframes()
        if not 0 <= frame < len(keys):
            raise DataError(
                f"{folder}: there is no keyframe {frame} (it has {len(keys)}, counted from 0). Choose a smaller --frame"
            )
        info["picture"] = str(_draw(dataset, keys[frame], picture))
    return json.dumps(info) if as_json else _info_text(info)


def _occupancy(folder: Path) -> dict[str, int] | None:
    """What is attached, or None."""
    if not has_occupancy(folder):
        return None
    logs = OccupancyStore(folder).logs.values()
    return {name: sum(getattr(entry, name) for entry in logs) for name in ("labelled", "voxels", "bytes")}


def _sampled(dataset: PreparedDataset) -> dict[str, object]:
    """Shares of the points by class and of the boxes by category, and over how many keyframes they were counted."""
    tally, categories, boxed = Tally(), Counter[str](), 0
    for key in _spread([key for log in _spread(dataset.logs()) for key in _labelled(dataset, log)]):
        tally.add(dataset.frame(key, {"labels"}), dataset.label_set)
    for key in _spread([key for key in dataset.keyframes() if dataset.summary(key.log).boxes]):
        boxes = dataset.reader(key.log).boxes(key.index)
        if boxes is not None:
            boxed += 1
            categories.update(boxes.category)
    return {
        "classes": {"keyframes": tally.counts["labelled"], "shares": _shares(tally.report(dataset.root, ()).classes)},
        "categories": {"keyframes": boxed, "shares": _shares(categories)},
    }


def _labelled(dataset: PreparedDataset, log: str) -> list[FrameKey]:
    """The keyframes of a log with a label per point; the log is opened only where some frames have none."""
    summary = dataset.summary(log)
    if summary.labelled in (0, summary.frames):
        return [FrameKey(log, index) for index in summary.keyframes if summary.labelled]
    reader = dataset.reader(log)
    return [FrameKey(log, index) for index in summary.keyframes if reader.labelled(index)]


def _spread(items: Sequence[_Item]) -> list[_Item]:
    """At most `_SAMPLED` of them, evenly spread."""
    if len(items) <= _SAMPLED:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, _SAMPLED).round().astype(int)]


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Name -> share of the whole, the largest first."""
    total = sum(counts.values())
    return {name: round(count / total, 4) for name, count in sorted(counts.items(), key=lambda item: -item[1])}


def _draw(dataset: PreparedDataset, key: FrameKey, out: Path) -> Path:
    """One frame from above with its boxes, coloured by class where it is labelled, by height otherwise; the car looks up."""
    from picture3d.view.box_overlay import draw_boxes
    from picture3d.view.colors import label_colors, ramp_colors
    from picture3d.view.pictures import bird_eye, page_from_lidar, png_bytes

    frame: Frame = dataset.frame(key)
    if frame.labels is not None and dataset.label_set is not None:
        colors = label_colors(dataset.label_set.to_train(frame.labels), dataset.label_set.train_names)
    else:
        colors = ramp_colors(frame.points.xyz[:, 2])
    upright = page_from_lidar(frame.ego_from_lidar)
    picture = bird_eye(upright.apply(frame.points.xyz), colors, size_px=960)
    if frame.boxes is not None and len(frame.boxes):
        boxes = frame.boxes
        center, yaw = upright.apply(boxes.center), boxes.yaw + upright.yaw
        picture = draw_boxes(picture, center, boxes.size, yaw, colors=[(255, 214, 90)] * len(boxes))
    with whole_file(out) as file:
        file.write(png_bytes(picture))
    return out


def _check_text(report: CheckReport) -> str:
    counts = ", ".join(f"{value:,} {name}" for name, value in report.counts.items() if value)
    lines = [f"{report.root}: {counts or 'empty'}"]
    for title, table in (("points per class", report.classes), ("boxes per category", report.categories)):
        if table:
            lines.append(f"{title}:")
            total = sum(table.values())
            width = max(len(name) for name in table)
            lines += [f"  {name:<{width}}  {count:>13,}  {100 * count / total:5.1f} %" for name, count in table.items()]
    errors = sum(finding.level == "error" for finding in report.findings)
    lines += _finding_lines(report.findings)
    warnings = len(report.findings) - errors
    lines.append("sound" if errors == 0 else f"not sound: {errors} errors")
    if warnings:
        lines[-1] += f", {warnings} warnings"
    return "\n".join(lines)


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Errors before warnings; of a kind of trouble that many logs have, the first ones and how many have it."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda f: f.level):
        kinds.setdefault((finding.level, finding.kind), []).append(finding)
    lines: list[str] = []
    for (level, kind), alike in kinds.items():
        shown = alike if len(alike) <= _FINDINGS_SHOWN + 1 else alike[:_FINDINGS_SHOWN]
        for finding in shown:
            times = f" ({finding.count} times)" if finding.count > 1 else ""
            lines.append(f"{level}: {kind}{times}: {finding.where}: {finding.what}")
        if len(alike) > len(shown):
            more, times = alike[len(shown) :], sum(finding.count for finding in alike)
            lines.append(f"{level}: {kind}: {len(more)} more places, {times} times in all; --json names each")
    return lines


def _info_text(info: dict[str, object]) -> str:
    def shown(value: object) -> str:
        match value:
            case bool() | None:
                return "none"
            case int():
                return f"{value:,}"
            case {"keyframes": int(count), "shares": dict(shares)}:
                return (
                    f"{', '.join(f'{name} {share:.1%}' for name, share in shares.items())} (of {count} keyframes)"
                    if shares
                    else "none"
                )
            case dict():
                return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
            case list():
                return ", ".join(str(entry) for entry in value) or "none"
            case _:
                return str(value)

    width = max(len(name) for name in info)
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {shown(value)}" for name, value in info.items())
