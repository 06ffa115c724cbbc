"""Several prepared datasets in one training: what each gives to an epoch, and what tells two mixtures apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from picture3d.datasets.class_balance import balanced_keys
from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.frame_choice import select_keyframes
from picture3d.datasets.frame_order import interleaved, shuffled_rows, stream_rows
from picture3d.datasets.object_sampling import ObjectSampler, open_sampler
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, Sample, read_sample
from picture3d.errors import ConfigError, DataError
from picture3d.structures.targets import FeatureSource

# Which stream of random numbers an order is drawn from; `loading` has 1 and 2.
_ORDER, _MIX = 0, 3


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One of the datasets of a training, with the frames of it that are used."""

    name: str
    dataset: PreparedDataset
    config: DataConfig  # how its frames become input; `also` is empty
    keys: tuple[FrameKey, ...]
    weight: float | None  # frames of it for each frame of the first source; None: each of its frames once an epoch
    sampler: ObjectSampler | None = None
    targets: FeatureSource | None = None
    mixed: bool = False  # one of several: its frames are named after it

    def read(self, key: FrameKey) -> Sample:
        """The part of a sample that is the same in every epoch; its name holds the source's if there are several.

        Raises:
            DataError: as :func:`read_sample`; naming the source if there are several.
        """
        try:
            sample = read_sample(self.dataset, key, self.config, targets=self.targets)
        except DataError as error:
            if not self.mixed:
                raise
            raise DataError(f"dataset '{self.name}' ({self.dataset.root}): {error}") from None
        return sample.renamed(f"{self.name}:{key}") if self.mixed else sample

    @property
    def selection(self) -> str:
        """Which keyframes of how many are used and why these, in words for a log."""
        config, used = self.config, len(set(self.keys))
        split = "all splits" if config.split is None else f"split {config.split}"
        interval = "every keyframe" if config.every == 1 else f"one keyframe in {config.every}"
        how = [interval, f"{100 * config.label_share:g} % of the labels"]
        how += ["labelled ones only"] if config.labelled_only else []
        how += ["with occupancy labels only"] if config.occupancy else []
        how += [] if config.max_frames is None else [f"at most {config.max_frames:,}"]
        if len(self.keys) != used or config.balance_classes:
            how.append(f"classes balanced to {len(self.keys):,} frames an epoch")
        whole = len(self.dataset.keyframes(config.split))
        return f"{self.name}, {split}: {used:,} of {whole:,} keyframes ({', '.join(how)})"

    def identity(self) -> dict[str, Any]:
        """What has to stay the same for a run to go on with this source, as JSON."""
        crc = 0
        for key in self.keys:
            crc = google_crc32c.extend(crc, f"{key};".encode())
        logs = sorted({key.log for key in self.keys})
        table = self.dataset.intensity().crc32c if self.config.intensity_scale.startswith("sensor_") else None
        # Only where it is asked for: runs from before there were such labels go on.
        labels = {"occupancy_crc32c": self.dataset.occupancy().fingerprint_of(logs)} if self.config.occupancy else {}
        return {
            "name": self.name,
            "frames": len(self.keys),
            "frames_crc32c": f"{crc:08x}",
            "logs_crc32c": self.dataset.fingerprint_of(logs),
            "weight": self.weight,
            "intensity_crc32c": table,
            **labels,
        }


def open_sources(
    config: DataConfig, *, seed: int, train: bool, targets: FeatureSource | Sequence[FeatureSource | None] | None = None
) -> tuple[Source, ...]:
    """The datasets of `config`, `config.root` first, each with its frames selected (and balanced, if training wants it).

    Args:
        config: which datasets and frames.
        seed: of balancing.
        train: False leaves balancing and the pasting of objects out.
        targets: teacher targets; one for all sources, or one for each in their order.

    Raises:
        DataError: if a dataset cannot be read, no frame of it is selected, or it lacks what the config asks for.
        ConfigError: if two sources have one name, or the classes of their labels differ.
    """
    wanted = [("", None, config.model_copy(update={"also": ()}))]
    wanted += [(other.name or "", other.weight, config.of_source(other)) for other in config.also]
    each = _each(targets, len(wanted))
    classes = DetectionClasses(config.box_classes)
    sources: list[Source] = []
    for (name, weight, settings), source_targets in zip(wanted, each, strict=True):
        dataset = PreparedDataset(settings.root)
        keys = select_keyframes(dataset, settings)
        if train and settings.balance_classes:
            keys = balanced_keys(dataset, keys, classes, seed=seed, min_box_points=settings.min_box_points)
        sources.append(
            Source(
                name=name or dataset.root.resolve().name,
                dataset=dataset,
                config=settings,
                keys=tuple(keys),
                weight=weight,
                sampler=open_sampler(settings.objects, classes, settings, dataset) if train and settings.objects else None,
                targets=source_targets,
                mixed=bool(config.also),
            )
        )
    if config.also:
        _check_mixture(sources)
    return tuple(sources)


class EpochOrder:
    """Which frame stands where in an epoch: a pure function of (seed, epoch) and of the sources.

    The first source gives each of its frames once an epoch. Another one of weight w gives w times as many, going on in the next
    epoch where it stopped in this one, so that its frames are all used equally often.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, shuffle: bool, window: int | None) -> None:
        self._seed, self._shuffle, self._window = seed, shuffle, window
        self._log_of_row = [_log_numbers(source.keys) for source in sources]
        first = len(sources[0].keys)
        self.counts = tuple(
            len(source.keys) if source.weight is None else max(1, round(source.weight * first)) for source in sources
        )
        self._offsets = np.cumsum([0, *(len(source.keys) for source in sources[:-1])])
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Frames of one epoch."""
        return sum(self.counts)

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """(frames of the epoch,) int64: rows of the keys of all sources, one source's after the other's."""
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._drawn(epoch))
        return self._last[1]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        taken = [self._of_source(number, epoch) + self._offsets[number] for number in range(len(self.counts))]
        if len(taken) == 1 or not self._shuffle:
            return np.concatenate(taken)
        which = interleaved(self.counts, np.random.default_rng([self._seed, epoch, _MIX]))
        rows = np.empty(len(which), np.int64)
        for number, part in enumerate(taken):
            rows[which == number] = part
        return rows

    def _of_source(self, number: int, epoch: int) -> NDArray[np.int64]:
        count, log_of_row = self.counts[number], self._log_of_row[number]

        def order(of_pass: int) -> NDArray[np.int64]:
            if not self._shuffle:
                return np.arange(len(log_of_row))
            entropy = [self._seed, of_pass, _ORDER] + ([number] if number else [])
            return shuffled_rows(log_of_row, self._window, np.random.default_rng(entropy))

        return stream_rows(len(log_of_row), epoch * count, count, order)


def _each(targets: FeatureSource | Sequence[FeatureSource | None] | None, sources: int) -> Sequence[FeatureSource | None]:
    if not isinstance(targets, Sequence):
        return [targets] * sources
    if len(targets) != sources:
        raise ValueError(f"{len(targets)} sources of targets for {sources} datasets")
    return targets


def _check_mixture(sources: Sequence[Source]) -> None:
    """Refuses early what could only go wrong later: names that mean two things, labels that do, columns that are not there."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.also: two datasets are called '{name}'; give one another name (name=...)")
        if not name or ":" in name:
            raise ConfigError(f"data.also: {name!r} cannot name a dataset; give it a name without ':'")
    first = sources[0]
    if first.config.labels:
        meanings = {source.name: source.dataset.label_set for source in sources if source.dataset.label_set is not None}
        if len({meaning.train_names for meaning in meanings.values()}) > 1:
            told = ", ".join(f"'{name}' {meaning.name}" for name, meaning in meanings.items())
            raise ConfigError(
                f"data.also: the labels of the datasets mean different classes ({told}). Set data.labels=false if labels are "
                "not learned from, or mix datasets of one label set."
            )
    for source in sources:
        source.read(source.keys[0])


def _log_numbers(keys: Sequence[FrameKey]) -> NDArray[np.int64]:
    number: dict[str, int] = {}
    return np.array([number.setdefault(key.log, len(number)) for key in keys], np.int64)
