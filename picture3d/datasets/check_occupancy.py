"""Are attached occupancy labels sound? Every block is read, decoded and matched with the frame it was made for.

=========================  =======  =========================================================================================
kind                       level    meaning
=========================  =======  =========================================================================================
``damaged``                error    a file is missing, cut off, does not match a checksum, or holds impossible cells
``occupancy-foreign``      error    labels belong to other sweeps than the frames of now, or to no frame
``occupancy-set-aside``    error    a label file of the log could not be read when labels were attached
``occupancy-partly``       warning  some keyframes of a log have labels and others have none
``occupancy-elsewhere``    warning  fewer than 60 % of a log's points in the grid lie in occupied cells; labels made from these
                                    sweeps cover nearly all of them, turned ones of a town a third to a half
=========================  =======  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from picture3d.datasets.check import CheckReport, Finding, LogFindings
from picture3d.datasets.occupancy_store import OccupancyStore, has_occupancy
from picture3d.datasets.prepared import PreparedDataset
from picture3d.errors import DataError
from picture3d.structures.occupancy import FREE

MIN_COVERED = 0.6


def with_occupancy(report: CheckReport) -> CheckReport:
    """The report on prepared frames, and what is found in the occupancy labels beside them; as it is if there are none.

    Raises:
        DataError: if the folder is not a prepared dataset.
    """
    if not has_occupancy(report.root):
        return report
    dataset = PreparedDataset(report.root)
    try:
        store = OccupancyStore(report.root)
    except DataError as error:
        return replace(report, findings=(*report.findings, Finding("error", "damaged", str(report.root), str(error))))
    findings = [finding for log in dataset.logs() for finding in _look_at(dataset, store, log)]
    labelled = sum(entry.labelled for entry in store.logs.values())
    voxels = sum(entry.voxels for entry in store.logs.values())
    counts = {**report.counts, "occupancy keyframes": labelled, "occupied voxels": voxels}
    return replace(report, findings=(*report.findings, *findings), counts=counts)


def _look_at(dataset: PreparedDataset, store: OccupancyStore, log: str) -> Iterator[Finding]:
    found = LogFindings(log)
    if log in store.set_aside:
        found.add("error", "occupancy-set-aside", "a label file could not be read; see `picture3d prepare occupancy`")
        yield from found.finish()
        return
    try:
        reader, frames = dataset.reader(log), store.labelled(log)
    except DataError as error:
        yield Finding("error", "damaged", log, str(error))
        return
    keyframes = set(reader.keyframes)
    covered = within = 0
    for frame in frames:
        if frame not in keyframes:
            found.add("error", "occupancy-foreign", f"labels of frame {frame}, which is no keyframe")
            continue
        try:
            token, points = reader.token(frame), reader.frame(frame, ()).points.xyz
        except DataError:
            continue  # the frame itself is damaged, which its own check says
        if token != store.token(log, frame):
            found.add("error", "occupancy-foreign", f"frame {frame} is sweep {token}, its labels are not")
            continue
        try:
            occupancy = store.read(log, frame, token)
        except DataError as error:
            found.add("error", "damaged", str(error))
            continue
        if occupancy is not None:
            covered += int((occupancy.at(points) != FREE).sum())
            within += int(occupancy.grid.contains(points).sum())
    if within and covered < MIN_COVERED * within:
        what = f"{100 * covered / within:.0f} % of the keyframes' points in the grid lie in occupied cells"
        found.add("warning", "occupancy-elsewhere", f"{what}; are the labels of these sweeps, in the LiDAR frame, z y x?")
    bare = len(keyframes) - len(frames)
    if frames and bare > 0:
        found.add("warning", "occupancy-partly", f"{len(frames)} of {len(keyframes)} keyframes have labels", bare)
    yield from found.finish()
