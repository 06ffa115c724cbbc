"""Batches of prepared frames for training. What a batch holds is a pure function of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.frame_choice import select_keyframes
from picture3d.datasets.mixing import EpochOrder, Source, open_sources
from picture3d.datasets.prepared import FrameKey
from picture3d.datasets.samples import DataConfig, Sample, finish_sample, load_sample
from picture3d.errors import ConfigError, DataError
from picture3d.structures.batch import PointBatch
from picture3d.structures.boxes import Boxes
from picture3d.structures.occupancy import Occupancy
from picture3d.structures.targets import FeatureSource
from picture3d.workers import usable_cores

__all__ = ["DataConfig", "FrameBatches", "Sample", "collate", "iterate_batches", "load_sample", "select_keyframes"]

# Which stream of random numbers is drawn from; the seeds of two streams never meet. `mixing` has 0 and 3.
_SAMPLE, _OBJECTS = 1, 2


class FrameBatches:
    """The batches of one dataset or of several mixed, epoch after epoch (a `BatchSource` of the training loop).

    The order of frames is drawn from (seed, epoch), see :class:`EpochOrder`; the augmentation of a frame and the objects pasted
    into it from (seed, epoch, its position in the epoch): none depends on the number of workers, nor on where an epoch is
    entered.

    `total_epochs` has to be set before the first batch if the config switches something off in the last ones.
    """

    total_epochs: int | None = None

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        targets: FeatureSource | Sequence[FeatureSource | None] | None = None,
        train: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Opens the dataset, or all of them, and selects its frames.

        Args:
            config: which frames, and how they become input.
            batch_size: frames per batch of one process; `world` processes take one batch of `batch_size` x `world` together.
            seed: of the order and the augmentation.
            workers: processes that load ahead, no more than there are cores; 0 loads in the caller. The cache of `config` lives
                in each of them.
            targets: where teacher targets are found, if they are wanted; one source for all datasets or one for each of them.
            train: False gives every frame once, in order, un-augmented, the last incomplete batch included. Of one dataset.
            rank: which process this is, 0..world - 1. It gets its part of every batch: neighbouring frames, one more or less
                than the others of an incomplete last batch, perhaps none.
            world: processes that take part.

        Raises:
            DataError: if the dataset or the database of objects cannot be read, or no frame is selected.
            ConfigError: if there are fewer frames than a batch needs.
        """
        self.config = config
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.seed = seed
        self.workers = workers
        self.train = train
        if config.also and not train:
            raise ConfigError("data.also: several datasets are mixed in training only; take one (also=[]) to go through it")
        self._take(open_sources(config, seed=seed, train=train, targets=targets))
        self._classes = DetectionClasses(config.box_classes)
        self._cache: dict[tuple[int, FrameKey], Sample] = {}
        self._cached_bytes = 0
        if self._drops_last and self.frames_per_epoch < batch_size * world:
            each = "" if world == 1 else f" for each of {world} processes"
            raise ConfigError(
                f"{config.root}: {self.frames_per_epoch} frames are selected, fewer than batch_size {batch_size}{each}. "
                f"Set batch_size to at most {self.frames_per_epoch // world}, or drop_last=false."
            )

    def _take(self, sources: tuple[Source, ...]) -> None:
        self.sources = sources
        self.dataset = sources[0].dataset
        self.keys = [key for source in sources for key in source.keys]
        self._source_of_key = np.repeat(np.arange(len(sources)), [len(source.keys) for source in sources])
        shuffle = self.train and self.config.shuffle
        self._order = EpochOrder(sources, seed=self.seed, shuffle=shuffle, window=self.config.shuffle_window)

    def choose(self, keys: Sequence[FrameKey]) -> None:
        """Goes through these frames of the (only) dataset instead of the selected ones."""
        (source,) = self.sources
        self._take((replace(source, keys=tuple(keys)),))

    @property
    def _drops_last(self) -> bool:
        return self.train and self.config.drop_last

    @property
    def frames_per_epoch(self) -> int:
        """Frames of one epoch, those of an incomplete last batch included."""
        return len(self._order)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(self.frames_per_epoch, self.batch_size * self.world)
        return full + (1 if rest and not self._drops_last else 0)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What a run is trained on, one entry per dataset, as JSON: a checkpoint is resumed on the same only."""
        return [source.identity() for source in self.sources]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[PointBatch]:
        """The batches of an epoch from `start_step` on; the same ones as an unbroken epoch gives."""
        steps = range(start_step, self.steps_per_epoch)
        if self.workers <= 0:
            for step in steps:
                yield self.batch(epoch, step)
            return
        # A generator of its own: DataLoader would draw from the global one, and training's numbers would depend on `workers`.
        loader = DataLoader(
            _Steps(self, epoch, steps),
            batch_size=None,
            num_workers=min(self.workers, usable_cores()),
            prefetch_factor=2,
            generator=torch.Generator(),
        )
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found

    def batch(self, epoch: int, step: int) -> PointBatch:
        """This process's part of one batch; of no frame, but with all columns, if there are fewer frames than processes.

        Raises:
            DataError: if a frame cannot be read, or lacks what the config asks for.
        """
        order = self.order(epoch)
        whole = self.batch_size * self.world
        first, count = step * whole, min(whole, len(order) - step * whole)
        begin, end = (first + count * part // self.world for part in (self.rank, self.rank + 1))
        samples = [self._sample(int(order[position]), epoch, position) for position in range(begin, max(end, begin + 1))]
        return collate(samples) if end > begin else collate(samples).without_frames()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """(frames_per_epoch,) int64: which of `keys` stands at each position of an epoch."""
        return self._order.rows(epoch)

    def _sample(self, row: int, epoch: int, position: int) -> Sample:
        rng = np.random.default_rng([self.seed, epoch, _SAMPLE, position]) if self.train else None
        number, key = int(self._source_of_key[row]), self.keys[row]
        source = self.sources[number]
        sample = self._cache.get((number, key))
        if sample is None:
            sample = source.read(key)
            # Once full the cache stays as it is: with a new order every epoch, throwing out the oldest would keep nothing.
            if self._cached_bytes + sample.nbytes <= self.config.cache_bytes:
                self._cache[number, key] = sample
                self._cached_bytes += sample.nbytes
        if source.sampler is not None and not self._among_last(
            epoch, max(self.config.objects_off_last, self.config.augment_off_last)
        ):
            sample = source.sampler.paste(sample, self._classes, np.random.default_rng([self.seed, epoch, _OBJECTS, position]))
        return finish_sample(sample, self.config, rng, augment=not self._among_last(epoch, self.config.augment_off_last))

    def _among_last(self, epoch: int, count: int) -> bool:
        if count == 0 or not self.train:
            return False
        if self.total_epochs is None:
            raise ConfigError(
                "something is switched off in the last epochs, but nobody said how many epochs there are. Give total_epochs."
            )
        return epoch >= self.total_epochs - count


class _Steps(Dataset[PointBatch | DataError]):
    """What a loader process is given: step -> batch, or the error to raise, so that it arrives as one line and no traceback."""

    def __init__(self, batches: FrameBatches, epoch: int, steps: range) -> None:
        self.batches, self.epoch, self.steps = batches, epoch, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, item: int) -> PointBatch | DataError:
        try:
            return self.batches.batch(self.epoch, self.steps[item])
        except DataError as error:
            return error


def iterate_batches(
    config: DataConfig,
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    workers: int = 0,
    targets: FeatureSource | Sequence[FeatureSource | None] | None = None,
) -> Iterator[PointBatch]:
    """The training batches of one epoch; see :class:`FrameBatches`."""
    return FrameBatches(config, batch_size=batch_size, seed=seed, workers=workers, targets=targets).epoch(epoch, start_step)


def collate(samples: Sequence[Sample]) -> PointBatch:
    """One batch of B >= 1 samples, their points one after the other.

    Teacher cells of all samples form one table: the rows of `point_cell` are shifted accordingly and stay -1 for points
    without a target. Labels (or targets) that only some samples have are filled with 0 (or -1). Boxes are there if any sample
    was annotated; a sample without has none.

    Raises:
        DataError: if the samples' targets differ in dimension, or only some have occupancy labels, or on other grids.
    """
    counts = [len(sample.xyz) for sample in samples]
    labels = None
    if any(sample.labels is not None for sample in samples):
        labels = _cat([np.zeros(n, np.int64) if s.labels is None else s.labels for s, n in zip(samples, counts, strict=True)])
    cell_features = cell_superclass = point_cell = None
    found = [sample.targets for sample in samples if sample.targets is not None]
    if found:
        if len({targets.features.shape[1] for targets in found}) > 1:
            raise DataError(f"{samples[0].name}: targets of different dimensions in one batch; use one teacher's targets")
        cell_features = _cat([targets.features for targets in found])
        cell_superclass = _cat([targets.superclass for targets in found]).to(torch.int64)
        cells, shift = [], 0
        for sample, n in zip(samples, counts, strict=True):
            cell = sample.point_cell
            cells.append(np.full(n, -1, np.int64) if cell is None else np.where(cell >= 0, cell + shift, -1))
            shift += 0 if sample.targets is None else len(sample.targets.features)
        point_cell = _cat(cells)
    boxes = box_class = box_sample = None
    if any(sample.boxes is not None for sample in samples):
        found_boxes = [
            (i, s.boxes, s.box_class) for i, s in enumerate(samples) if s.boxes is not None and s.box_class is not None
        ]
        boxes = _cat([_box_rows(rows) for _, rows, _ in found_boxes])
        box_class = _cat([classes for _, _, classes in found_boxes])
        box_sample = _cat([np.full(len(rows), i, np.int64) for i, rows, _ in found_boxes])
    occupancy = [(i, sample.occupancy) for i, sample in enumerate(samples) if sample.occupancy is not None]
    if 0 < len(occupancy) < len(samples):
        raise DataError("some frames of a batch have occupancy labels and others have none; set data.occupancy")
    if len({found.grid for _, found in occupancy}) > 1:
        raise DataError(
            f"{samples[0].name}: occupancy labels on different grids in one batch. Mix datasets of one occupancy grid only, or "
            "set data.occupancy=false."
        )
    return PointBatch(
        xyz=_cat([sample.xyz for sample in samples]),
        features=_cat([sample.features for sample in samples]),
        sample=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)),
        batch_size=len(samples),
        frame_names=tuple(sample.name for sample in samples),
        labels=labels,
        cell_features=cell_features,
        cell_superclass=cell_superclass,
        point_cell=point_cell,
        boxes=boxes,
        box_class=box_class,
        box_sample=box_sample,
        occupancy_cell=_cat([_cell_rows(found, i) for i, found in occupancy]) if occupancy else None,
        occupancy_class=_cat([found.label for _, found in occupancy]) if occupancy else None,
        occupancy_grid=occupancy[0][1].grid if occupancy else None,
    )


def _cell_rows(occupancy: Occupancy, sample: int) -> NDArray[np.int32]:
    """(K, 4) int32 as `PointBatch.occupancy_cell`."""
    return np.concatenate([np.full((len(occupancy), 1), sample, np.int32), occupancy.index], axis=1, dtype=np.int32)


def _box_rows(boxes: Boxes) -> NDArray[np.float32]:
    """(B, 9) float32 as `PointBatch.boxes`; an unknown velocity is 0, as the published detectors are trained."""
    velocity = np.nan_to_num(boxes.velocity, nan=0.0)
    return np.column_stack([boxes.center, boxes.size, boxes.yaw, velocity]).astype(np.float32)


def _cat(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    """Always a copy: a cached sample must not be reachable through a batch."""
    return torch.from_numpy(np.concatenate(arrays))
