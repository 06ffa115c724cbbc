"""From configs to things that run: networks, tasks, batches, sources of teacher features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from picture3d.config import read_config_tree
from picture3d.datasets.loading import FrameBatches, collate
from picture3d.datasets.samples import DataConfig, sweep_sample
from picture3d.errors import ConfigError
from picture3d.pretrain.picture import Picture, PretrainTask
from picture3d.pretrain.whitening import FeatureWhitening
from picture3d.recipes.catalogue import RunConfig, TaskConfig
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, PretrainConfig, SegmentationConfig, TargetsConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.frame import Frame
from picture3d.structures.points import PointCloud
from picture3d.structures.poses import Pose
from picture3d.structures.targets import FeatureSource
from picture3d.tasks.detection import DetectionNet, DetectionTask
from picture3d.tasks.encoder import JoinedEncoder, load_encoder
from picture3d.tasks.occupancy import OccupancyNet, OccupancyTask
from picture3d.tasks.segmentation import SegmentationNet, SegmentationTask
from picture3d.teachers.minkunet import fingerprint
from picture3d.teachers.protocol import Teacher
from picture3d.training.distributed import Place
from picture3d.training.weights_import import load_any_weights


def build_picture(config: PretrainConfig, device: torch.device, *, epoch_batches: int | None = None) -> PretrainTask:
    """The pre-training network, its first weights drawn from the training seed.

    With `epoch_batches`, the batches of an epoch, it is ready for training: a gate is given its sample.
    """
    torch.manual_seed(config.training.seed)
    network = Picture(
        config.grid.grid,
        config.in_features,
        config.encoder,
        teacher_channels=config.teacher_channels,
        visible_channels=config.visible_channels,
        decoder=config.decoder.kind,
        decoder_blocks=config.decoder.blocks,
        num_predicted_points=config.loss.num_predicted_points,
        pillars=config.grid.pillars,
        self_teacher=config.targets.ema if config.targets.mode == "ema" else None,
        hierarchy=config.hierarchy,
        gate=config.gate,
        whitening=build_whitening(config),
    )
    sample = None
    if config.gate.enabled and epoch_batches is not None:
        sample = sample_batch(config.data, config.gate.frames).to(device)
    return PretrainTask(network.to(device), config.mask, config.loss, gate_sample=sample, epoch_batches=epoch_batches)


def build_whitening(config: PretrainConfig) -> FeatureWhitening | None:
    """What whitens teacher features, where the losses want them so."""
    if config.loss.features_scale == "teacher" or not config.loss.teaches_features:
        return None
    return FeatureWhitening(config.feature_channels, config.loss.whitening_floor)


def build_segmentation(config: SegmentationConfig, device: torch.device) -> SegmentationTask:
    """The segmentation network, its first weights drawn from the training seed."""
    torch.manual_seed(config.training.seed)
    network = SegmentationNet(
        config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars, config=config.task
    )
    return SegmentationTask(network.to(device), config.task)


def build_detection(config: DetectionConfig, device: torch.device) -> DetectionTask:
    """The detector, its first weights drawn from the training seed."""
    torch.manual_seed(config.training.seed)
    network = DetectionNet(
        config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars, config=config.task
    )
    return DetectionTask(network.to(device), config.task)


def build_occupancy(config: OccupancyConfig, device: torch.device) -> OccupancyTask:
    """The occupancy network, its first weights drawn from the training seed."""
    torch.manual_seed(config.training.seed)
    network = OccupancyNet(
        config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars, config=config.task
    )
    return OccupancyTask(network.to(device), config.task)


def build_task(config: TaskConfig, device: torch.device) -> SegmentationTask | DetectionTask | OccupancyTask:
    """The network of a fine-tuning of any kind, as the training loop sees it."""
    match config:
        case SegmentationConfig():
            return build_segmentation(config, device)
        case DetectionConfig():
            return build_detection(config, device)
        case OccupancyConfig():
            return build_occupancy(config, device)


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """The network of a run of any kind."""
    if isinstance(config, PretrainConfig):
        return build_picture(config, device).module
    return build_task(config, device).module


def training_batches(
    config: RunConfig, targets: FeatureSource | Sequence[FeatureSource | None] | None, place: Place | None = None
) -> FrameBatches:
    """Shuffled, augmented batches as the config wants them; of several processes each gets its part."""
    place = place or Place()
    batches = FrameBatches(
        config.data,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        workers=config.workers,
        targets=targets,
        rank=place.rank,
        world=place.world,
    )
    batches.total_epochs = config.training.planned_epochs(batches.steps_per_epoch)
    return batches


def scoring_batches(
    data: DataConfig,
    *,
    root: Path | None,
    split: str | None,
    labels: bool = True,
    targets: FeatureSource | None = None,
    occupancy: bool | None = None,
) -> FrameBatches:
    """Every frame of a split once, alone, in order, as it is: no augmentation, every label (or none), nothing left out.

    With occupancy labels (None: as `data` says) it is every labelled frame.
    """
    whole = data.model_copy(
        update={"root": root or data.root, "split": split, "label_share": 1.0, "every": 1, "max_frames": None, "also": ()}
        # Every labelled point counts, those outside the grid too: the network answers for them.
        | {"labels": labels, "box_classes": (), "range_min": None, "range_max": None}
        | {"occupancy": data.occupancy if occupancy is None else occupancy}
    )
    return FrameBatches(whole, batch_size=1, seed=0, train=False, targets=targets)


def sample_batch(data: DataConfig, frames: int) -> PointBatch:
    """A few whole sweeps as one batch: frames evenly spread over a dataset (the first of several), as they are."""
    return sample_frames(data, frames, batch_size=frames).batch(0, 0)


def sample_frames(
    data: DataConfig, frames: int, *, root: Path | None = None, split: str | None = None, batch_size: int = 1
) -> FrameBatches:
    """Whole sweeps evenly spread over a dataset (the first of several), as they are: not augmented, without labels."""
    updates: dict[str, object] = {"also": (), "labels": False, "box_classes": (), "label_share": 1.0, "max_frames": None}
    updates |= {"root": root or data.root, "split": split or data.split, "every": 1, "objects": None, "cache_bytes": 0}
    batches = FrameBatches(data.model_copy(update=updates), batch_size=batch_size, seed=0, train=False)
    keys = batches.keys
    count = min(frames, len(keys))
    batches.choose([keys[(2 * index + 1) * len(keys) // (2 * count)] for index in range(count)])
    return batches


def build_teacher(name: str, weights: Path | None, device: torch.device) -> Teacher:
    """A teacher that comes with the package.

    Raises:
        ConfigError: for an unknown name, or a minkunet without weights.
    """
    match name:
        case "town":
            from picture3d.teachers.town.teacher import load_town_teacher

            if weights is not None:
                raise ConfigError("the town teacher brings its own weights; leave --weights out, or use --teacher minkunet")
            return load_town_teacher(device)
        case "minkunet":
            from picture3d.teachers.minkunet import load_minkunet_teacher

            if weights is None:
                raise ConfigError(
                    "the minkunet teacher needs a checkpoint: --weights FILE. Where to get one: docs/teachers.md. The town "
                    "teacher needs no download. Give --weights FILE, or take --teacher town."
                )
            return load_minkunet_teacher(weights, device=device)
        case "handcrafted":
            from picture3d.teachers.handcrafted import HandcraftedTeacher

            if weights is not None:
                raise ConfigError("the handcrafted teacher has no weights; leave --weights out")
            return HandcraftedTeacher(device)
        case "encoder":
            if weights is None:
                raise ConfigError(
                    "the teacher encoder is a finished run of this package. Name its folder or checkpoint: --weights RUN"
                )
            return _encoder_teacher(weights, device)
        case "ema":
            raise ConfigError(
                "the self-teacher changes with every step of a training, so there is nothing to store or load: pre-train with "
                "--set targets.mode=ema (or --recipe town-ema). To store the features of a finished encoder, use the teacher "
                "encoder."
            )
        case _:
            raise ConfigError(f"no teacher is called '{name}'. Choose one of town, handcrafted, minkunet and encoder")


@dataclass(frozen=True, slots=True)
class _SweepBatch:
    """Makes single sweeps the input that a data config describes, every point kept in its row."""

    data: DataConfig

    def __call__(self, points: PointCloud) -> PointBatch:
        return collate([sweep_sample(Frame("sweep", 0, "sweep", 0, points, None, Pose.identity()), self.data)])


def _encoder_teacher(source: Path, device: torch.device) -> Teacher:
    """The encoder of a run or checkpoint, frozen."""
    from picture3d.teachers.encoder import EncoderTeacher, voxel_quantisation

    checkpoint = load_any_weights(source)
    tree = checkpoint.meta.get("config")
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: does not say how its encoder was built; name a run of this package or its checkpoint")
    config = run_config_of(tree, str(source))
    if config.data.sweeps > 1:
        raise ConfigError(
            f"{source}: its encoder learnt from {config.data.sweeps} sweeps merged; a teacher sees each sweep alone. Use one "
            "that was trained with data.sweeps=1."
        )
    encoder = JoinedEncoder(config.grid.grid, config.in_features, config.encoder, pillars=config.grid.pillars)
    load_encoder(encoder, source)
    return EncoderTeacher(
        network=encoder.to(device).eval().requires_grad_(False),
        batch_of=_SweepBatch(config.data),
        dimension=encoder.joined_channels,
        fingerprint=fingerprint(encoder.state_dict()),
        quantisation=voxel_quantisation(config.grid.grid, cylinder=config.grid.cylinder),
        device=device,
    )


def build_targets(config: TargetsConfig, prepared: Path, device: torch.device) -> FeatureSource | None:
    """Where the targets of a frame are found, as the config wants it."""
    match config.mode:
        case "none" | "ema":
            return None
        case "stored":
            from picture3d.teachers.store import FeatureStore

            return FeatureStore(prepared / "targets" / config.teacher)
        case "online":
            from picture3d.teachers.targets import OnlineTeacherSource

            teacher = build_teacher(config.teacher, config.weights, device)
            return OnlineTeacherSource(teacher, num_superclasses=config.superclasses)


def build_training_targets(
    config: TargetsConfig, data: DataConfig, device: torch.device
) -> FeatureSource | list[FeatureSource | None] | None:
    """Where the targets of all datasets of a training are found: a store beside each, or one teacher for all."""
    if config.mode == "stored":
        return [build_targets(config, root, device) for root in (data.root, *(other.root for other in data.also))]
    return build_targets(config, data.root, device)


def read_run_config(run: Path) -> RunConfig:
    """The config of a run folder, as the kind it is.

    Raises:
        ConfigError: if the folder holds no config, or one of another kind.
    """
    path = run / "config.json"
    return run_config_of(read_config_tree(path), str(path))


def run_config_of(tree: dict[str, Any], source: str) -> RunConfig:
    """The config of a run from its JSON tree, as the kind it is; `source` is named in errors.

    Raises:
        ConfigError: if it is of another kind, or does not hold.
    """
    match tree.get("kind"):
        case "pretrain":
            return PretrainConfig.from_tree(tree, source=source)
        case "segmentation":
            return SegmentationConfig.from_tree(tree, source=source)
        case "detection":
            return DetectionConfig.from_tree(tree, source=source)
        case "occupancy":
            return OccupancyConfig.from_tree(tree, source=source)
        case other:
            raise ConfigError(
                f"{source}: not the config of a run (its kind is {other!r}). Name a run folder of `pretrain` or `finetune`, or "
                "its config.json."
            )
