"""Targets: a teacher's features of a sweep and the superclass of each cell, computed for a whole dataset or on the spot."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.errors import ConfigError, DataError
from picture3d.ops.kmeans import kmeans
from picture3d.ops.quantize import quantise_points
from picture3d.structures.frame import Frame
from picture3d.structures.targets import FrameTargets
from picture3d.teachers.feature_basis import MAX_FITTED_DIMENSION, BasisFit, FeatureBasis, FrameMoments
from picture3d.teachers.feature_codecs import FeatureCodec, encode_features, smallest_codec, stored_cosine
from picture3d.teachers.protocol import Teacher
from picture3d.teachers.shared_fit import forget_moments, moments_of_job
from picture3d.teachers.store import (
    StoreSettings,
    cells_checksum,
    fits,
    same_points,
    store_folder,
    target_path,
    write_file_list,
    xyz_checksum,
)
from picture3d.teachers.target_file import TargetFile, TargetWriter

MAX_SUPERCLASSES = 255  # a superclass is one byte
CODECS = ("auto", *FeatureCodec)
_FIT_FRAMES = 32  # on which a basis is fitted


class FrameIndex(Protocol):
    """Where a frame is found."""

    @property
    def log(self) -> str:
        """Name of its log."""
        ...

    @property
    def index(self) -> int:
        """Position in its log."""
        ...


class KeyedFrames(Protocol):
    """What is needed of a prepared dataset."""

    root: Path

    def logs(self, split: str | None = None) -> Sequence[str]:
        """Names of the logs."""
        ...

    def keyframes(self, split: str | None = None) -> Sequence[FrameIndex]:
        """The frames that get targets, by log and time."""
        ...

    def frame(self, key: Any, columns: Any = None) -> Frame:
        """One frame with the named optional columns."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherView:
    """What a teacher says about one frame, unrounded. M cells, N points."""

    features: NDArray[np.float32]  # (M, D)
    superclass: NDArray[np.uint8]  # (M,)
    point_cell: NDArray[np.int64]  # (N,), -1 where a point is in no cell


@dataclass(frozen=True, slots=True)
class TargetsSummary:
    """What a run over a dataset left. Counts cover the whole store of the split."""

    folder: Path
    logs: int
    logs_made: int  # in this run; the others were finished before
    frames: int
    cells: int
    bytes: int
    mean_cosine: float  # between the teacher's features and the stored ones, over the frames
    codecs: dict[str, int] = field(default_factory=dict)  # frames per codec

    def __str__(self) -> str:
        stored = ", ".join(f"{count} as {name}" for name, count in sorted(self.codecs.items())) or "none"
        return (
            f"{self.folder}: targets of {self.frames} keyframes in {self.logs} logs ({self.logs_made} made now), "
            f"{self.cells:,} cells, {self.bytes / 2**20:.1f} MiB, {stored}, mean cosine {self.mean_cosine:.4f}"
        )


def view_frame(frame: Frame, teacher: Teacher, *, num_superclasses: int, seed: int) -> TeacherView:
    """Runs the teacher over one frame and clusters its cells: a pure function of points, teacher, k and seed.

    Raises:
        DataError: if the teacher gives something else than finite features of its dimension.
    """
    features, point_cell = _cell_features(frame, teacher)
    labels, _ = kmeans(features, num_superclasses, _generator(frame, seed))
    return TeacherView(
        features=features.to("cpu", torch.float32).numpy(),
        superclass=labels.to("cpu", torch.uint8).numpy(),
        point_cell=point_cell.numpy(),
    )


def _cell_features(frame: Frame, teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (M, D) on the teacher's device, and the cell (N,) of every point on the CPU."""
    place = f"{frame.log}/{frame.index}"
    cells = teacher.cell_features(frame.points)
    features = cells.features.detach()
    if features.shape[1] != teacher.dimension or len(cells.point_cell) != len(frame.points):
        raise DataError(
            f"{place}: teacher {teacher.name} gave features {tuple(features.shape)} for {len(cells.point_cell)} points, "
            f"expected length {teacher.dimension} and {len(frame.points)} points. Correct the teacher: it gives one row for "
            "each cell, and the cell of each point."
        )
    # Rows are those of the cells as the CPU derives them: on another device a point on the very edge may fall beside.
    own = quantise_points(torch.from_numpy(np.array(frame.points.xyz, np.float32)), teacher.quantisation)
    features = features[cells.point_cell[own.representative.to(cells.point_cell.device)]]
    if not bool(torch.isfinite(features).all()):
        raise DataError(f"{place}: teacher {teacher.name} gave a feature that is not finite; look at this frame's points")
    return features, own.point_cell


class OnlineTeacherSource:
    """Runs the teacher whenever a frame is loaded; a `FeatureSource` without a store."""

    def __init__(self, teacher: Teacher, *, num_superclasses: int = 8, seed: int = 0) -> None:
        _check_superclasses(num_superclasses)
        self.teacher = teacher
        self.num_superclasses = num_superclasses
        self.seed = seed
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def targets(self, frame: Frame) -> FrameTargets:
        """The targets of an un-augmented frame, the same ones a float16 store would give."""
        with self._lock:
            view = view_frame(frame, self.teacher, num_superclasses=self.num_superclasses, seed=self.seed)
        return FrameTargets(view.features.astype(np.float16), view.superclass, view.point_cell)


def compute_targets(
    dataset: KeyedFrames,
    teacher: Teacher,
    *,
    folder: Path | None = None,
    split: str | None = None,
    num_superclasses: int = 8,
    seed: int = 0,
    codec: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> TargetsSummary:
    """Runs a teacher over the keyframes of a dataset and stores what it says, log by log.

    A log that an earlier run finished with the same settings is kept; a log cut off in its middle leaves no file. Memory does
    not grow with the number of frames.

    Args:
        dataset: prepared frames.
        teacher: whose features.
        folder: where to; by default ``ROOT/targets/<teacher>``.
        split: only this split; None for every log.
        num_superclasses: k of the clustering of each frame's cells.
        seed: of the clustering.
        codec: how features are stored: "float16", "int8", "pca", "product", or "auto": for each frame the smallest of pca, int8
            and float16 that keeps a mean cosine of 0.995. A basis (pca, product) is fitted on at most 32 keyframes, drawn by
            the seed from those of the split, before anything is stored; it stays in the folder, also for later splits.
        progress: called with (keyframes done, keyframes in all).
        share: (rank, world): every `world`-th log from log `rank` on; the others are the other processes' part. The summary
            then covers this part only.

    Raises:
        ConfigError: for a wrong number of superclasses or codec.
        DataError: if the folder belongs to another teacher or other settings, or a frame cannot be read.
    """
    _check_superclasses(num_superclasses)
    if codec not in CODECS:
        raise ConfigError(f"unknown codec '{codec}'. Choose one of {', '.join(CODECS)}")
    folder = store_folder(dataset.root, teacher.name) if folder is None else folder
    wanted = StoreSettings.of(teacher, num_superclasses=num_superclasses, seed=seed, codec=codec)
    keyframes = dataset.keyframes(split)
    settings = _claimed(folder, wanted, lambda: _fitted_basis(dataset, keyframes, teacher, wanted, folder, share))
    keys: Mapping[str, list[FrameIndex]] = defaultdict(list)
    for key in keyframes:
        keys[key.log].append(key)
    rank, world = share
    every_log = list(dataset.logs(split))
    logs = every_log[rank::world]
    total, done, made = sum(len(keys.get(log, [])) for log in logs), 0, 0
    show = progress or (lambda done, total: None)
    show(0, total)
    files: list[_LogCounts] = []
    for log in logs:
        of_log = keys.get(log, [])
        path = target_path(folder, log)
        finished = _finished(path, settings, log, of_log, dataset)
        if finished is None:
            with TargetWriter(
                path, log=log, settings_digest=settings.digest, dimension=teacher.dimension, basis=settings.basis
            ) as writer:
                for count, key in enumerate(of_log, start=1):
                    _add(writer, dataset.frame(key, ()), teacher, settings)
                    show(done + count, total)
            made += 1
            finished = TargetFile(path, settings.basis)
        done += len(of_log)
        show(done, total)
        files.append(_count(finished))
    others = (log for index, log in enumerate(every_log) if index % world != rank)
    if all(_finished(target_path(folder, log), settings, log, keys.get(log, []), dataset) for log in others):
        write_file_list(folder)  # by whoever is last, for all
    return _summarise(folder, files, made)


@dataclass(frozen=True, slots=True)
class _LogCounts:
    """Sums over one log."""

    frames: int
    cells: int
    bytes: int
    cosines: float
    codecs: dict[str, int]


def _add(writer: TargetWriter, frame: Frame, teacher: Teacher, settings: StoreSettings) -> None:
    view = view_frame(frame, teacher, num_superclasses=settings.num_superclasses, seed=settings.seed)
    if settings.codec == "auto":
        codec, encoded, cosine = smallest_codec(view.features, settings.basis)
    else:
        codec = FeatureCodec(settings.codec)
        encoded = encode_features(view.features, codec, settings.basis)
        cosine = stored_cosine(view.features, encoded, codec, settings.basis)
    writer.add(
        frame.index,
        encoded,
        codec,
        cosine,
        view.superclass,
        points=len(frame.points),
        xyz_crc32c=xyz_checksum(frame.points.xyz),
        cells_crc32c=cells_checksum(view.point_cell),
    )


def _claimed(folder: Path, settings: StoreSettings, fit: Callable[[], FeatureBasis | None]) -> StoreSettings:
    """The settings in `teacher.json`, checked to be these; where there is none yet it is written, with a basis fitted now.

    The basis of an earlier run is kept, so that all logs have the same; a store made without one goes on without.
    """
    path = folder / "teacher.json"
    if not path.exists():
        basis = fit()
        if not path.exists():  # by another process in the meantime
            replace(settings, basis=basis).save(folder)
    forget_moments(folder)
    # Read back also when it was written just now: of several processes, all take the basis of the first.
    stored = StoreSettings.load(folder)
    different = stored.differences(settings)
    if different:
        raise DataError(
            f"{folder}: holds the features of another teacher or other settings: {', '.join(different)}. "
            f"Remove the folder to compute them anew."
        )
    return stored


def _fitted_basis(
    dataset: KeyedFrames,
    keys: Sequence[FrameIndex],
    teacher: Teacher,
    settings: StoreSettings,
    folder: Path,
    share: tuple[int, int],
) -> FeatureBasis | None:
    """The basis that the codec needs: a pure function of the split's frames, the teacher and the seed.

    None, too, if another process of the job has written it by now.
    """
    codec, seed = settings.codec, settings.seed
    if codec in (FeatureCodec.FLOAT16, FeatureCodec.INT8) or (codec == "auto" and teacher.dimension > MAX_FITTED_DIMENSION):
        return None
    rng = np.random.default_rng([seed, teacher.dimension])
    chosen = np.sort(rng.permutation(len(keys))[:_FIT_FRAMES])
    fit = BasisFit(teacher.dimension, len(chosen), seed)

    def moments(number: int) -> FrameMoments:
        features, _ = _cell_features(dataset.frame(keys[chosen[number]], ()), teacher)
        return fit.moments(number, features.to("cpu", torch.float32).numpy())

    done = (folder / "teacher.json").exists
    frames = moments_of_job(folder, settings.digest, len(chosen), moments, done, share)
    if frames is None:
        return None
    for frame in frames:
        fit.add(frame)
    if codec == FeatureCodec.PRODUCT:
        return fit.code_books(torch.Generator("cpu").manual_seed(int(rng.integers(1 << 62))))
    return fit.principal()


def _finished(
    path: Path, settings: StoreSettings, log: str, keys: Sequence[FrameIndex], dataset: KeyedFrames
) -> TargetFile | None:
    """The file an earlier run finished for these frames, or None if the log has to be done (again)."""
    if not path.exists():
        return None
    try:
        file = TargetFile(path, settings.basis)
    except DataError:
        return None
    if not fits(file, settings, log, tuple(key.index for key in keys)):
        return None
    # A log that was prepared anew is seen at its ends; a frame between them that changed is refused when it is read.
    ends = {key.index: key for key in (*keys[:1], *keys[-1:])}
    return file if all(same_points(file.entries[i], dataset.frame(key, ())) for i, key in ends.items()) else None


def _count(file: TargetFile) -> _LogCounts:
    entries = file.entries.values()
    codecs: dict[str, int] = defaultdict(int)
    for entry in entries:
        codecs[str(entry.codec)] += 1
    return _LogCounts(
        frames=len(entries),
        cells=sum(entry.cells for entry in entries),
        bytes=file.path.stat().st_size,
        cosines=sum(entry.cosine for entry in entries),
        codecs=dict(codecs),
    )


def _summarise(folder: Path, logs: Sequence[_LogCounts], made: int) -> TargetsSummary:
    frames = sum(log.frames for log in logs)
    codecs: dict[str, int] = defaultdict(int)
    for log in logs:
        for name, count in log.codecs.items():
            codecs[name] += count
    return TargetsSummary(
        folder=folder,
        logs=len(logs),
        logs_made=made,
        frames=frames,
        cells=sum(log.cells for log in logs),
        bytes=sum(log.bytes for log in logs),
        mean_cosine=sum(log.cosines for log in logs) / frames if frames else 1.0,
        codecs=dict(codecs),
    )


def _generator(frame: Frame, seed: int) -> torch.Generator:
    """Randomness of one frame's clustering: a pure function of the seed and the frame's place."""
    state = np.random.SeedSequence([seed, google_crc32c.value(frame.log.encode()), frame.index]).generate_state(2)
    value = (int(state[0]) << 32 | int(state[1])) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator("cpu").manual_seed(value)


def _check_superclasses(num_superclasses: int) -> None:
    if not 1 <= num_superclasses <= MAX_SUPERCLASSES:
        raise ConfigError(f"{num_superclasses} superclasses cannot be stored. Ask for 1 to {MAX_SUPERCLASSES}")
