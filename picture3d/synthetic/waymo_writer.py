"""Writes drives through procedural towns as raw Waymo Open Dataset v1.x, which every reader of that format takes.

Layout, below the root::

    training/segment-<name>_with_camera_labels.tfrecord     one `Frame` message per record, 10 Hz
    validation/segment-<name>_with_camera_labels.tfrecord   the same, of the last `val_scenes` scenes
    picture3d_splits.json                                   settings, and the names of the segments by split

Scene k is a town of its own, of seed :func:`town_seed`. There are no images and no camera labels. A segment is written in two
steps, because every frame tells how many objects the whole segment has: frames without their context go to `unfinished/`,
then all of them, context first, to their file, which takes its name when it is whole. A run that was killed goes on with the
first segment that is not there and ends with the same bytes; `picture3d_splits.json` is written last.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picture3d.formats.tfrecord import RecordWriter, read_records
from picture3d.synthetic.nuscenes_rows import town_seed
from picture3d.synthetic.scene_jobs import UNFINISHED, Progress, check_counts, write_town
from picture3d.synthetic.waymo_drive import FRAME_GAP_US, WaymoConfig, waymo_frame
from picture3d.synthetic.waymo_messages import frame_body, frame_context
from picture3d.synthetic.world import build_town

# Raised when the same seed gives other frames, so that a dataset is never finished by a generator that did not begin it.
GENERATOR = 1
SPLIT_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True, slots=True)
class SegmentJob:
    """All that a worker needs to write one segment."""

    root: Path
    split: str  # "train" or "val"
    seed: int
    scene: int  # from 1
    config: WaymoConfig

    @property
    def name(self) -> str:
        """The context's name, as the published ones: a number, begin and end of the drive in seconds and milliseconds."""
        digest = hashlib.sha256(f"picture3d town {self.seed} {self.scene}".encode()).digest()
        seconds, rest_us = divmod(self.config.frames * FRAME_GAP_US, 1_000_000)
        number = int.from_bytes(digest[:8], "big") % 10**19
        return f"{number:019d}_0_000_{seconds}_{rest_us // 1000:03d}"

    @property
    def path(self) -> Path:
        """The finished file."""
        return self.root / SPLIT_FOLDERS[self.split] / f"segment-{self.name}_with_camera_labels.tfrecord"


def write_waymo(
    root: Path,
    *,
    scenes: int = 4,
    frames_per_scene: int = 200,
    seed: int = 0,
    val_scenes: int = 1,
    config: WaymoConfig = WaymoConfig(),  # noqa: B008 - frozen
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the dataset, or what is missing of it; does nothing if it is whole.

    Args:
        root: folder of the dataset; made if missing.
        scenes: number of segments, each in a town of its own.
        frames_per_scene: frames of a segment, at 10 Hz; the real segments have about 200.
        seed: of the whole dataset; the same arguments give the same bytes.
        val_scenes: how many of the last scenes are for validation.
        config: everything else; its number of frames is replaced by the argument above.
        processes: segments written at the same time; the bytes do not depend on it.
        progress: called with (frames done, frames in all).

    Raises:
        ConfigError: for impossible numbers, or if `root` holds a dataset of other settings.
        DataError: if a file cannot be written.
    """
    check_counts(scenes=scenes, frames=("frames_per_scene", frames_per_scene), val_scenes=val_scenes, processes=processes)
    config = config.model_copy(update={"frames": frames_per_scene})
    jobs, settings = segment_jobs(root, "waymo v1", scenes=scenes, val_scenes=val_scenes, seed=seed, config=config)
    write_town(
        root,
        settings,
        jobs,
        write=_write_segment,
        is_written=lambda job: job.path.exists(),
        frames=frames_per_scene,
        own_folders=SPLIT_FOLDERS.values(),
        processes=processes,
        progress=progress,
    )


def segment_jobs(
    root: Path, form: str, *, scenes: int, val_scenes: int, seed: int, config: WaymoConfig
) -> tuple[list[SegmentJob], dict[str, Any]]:
    """The segments of a town in either version of the dataset, and all that their bytes depend on."""
    jobs = [
        SegmentJob(root, "train" if scene <= scenes - val_scenes else "val", seed, scene, config)
        for scene in range(1, scenes + 1)
    ]
    settings: dict[str, Any] = {
        "dataset": "picture3d town",
        "format": form,
        "generator": GENERATOR,
        "seed": seed,
        "splits": {split: [job.name for job in jobs if job.split == split] for split in SPLIT_FOLDERS},
        "drive": config.model_dump(mode="json"),
    }
    return jobs, settings


def _write_segment(job: SegmentJob) -> Iterator[int]:
    """Writes one segment; yields 1 after each frame."""
    town = build_town(town_seed(job.seed, job.scene), job.config.town)
    bodies = job.root / UNFINISHED / f"{job.name}.tfrecord"
    types: dict[str, int] = {}  # of every object that has a label, by its id
    with RecordWriter(bodies) as writer:
        for index in range(job.config.frames):
            frame = waymo_frame(town, job.config, index)
            types.update(zip(frame.boxes.track_id, frame.box_type.tolist(), strict=True))
            writer.write(frame_body(frame))
            # The last tick follows the finished file.
            if index + 1 < job.config.frames:
                yield 1
    context = frame_context(job.name, Counter(types.values()))
    with RecordWriter(job.path) as writer:
        for _, body in read_records(bodies):
            writer.write(context + body)
    bodies.unlink()
    yield 1
