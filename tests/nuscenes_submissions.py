"""Synthetic labels and submissions of the nuScenes detection challenge, as columns and as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from picture3d.formats.nuscenes_results import ATTRIBUTES, CLASSES, DetectionColumns, rotation_of_yaw

ATTRIBUTES_OF = {
    "pedestrian": (0, 1, 2),
    "motorcycle": (3, 4),
    "bicycle": (3, 4),
    "traffic_cone": (),
    "barrier": (),
}
VEHICLE_ATTRIBUTES = (5, 6, 7)


def draw(samples: int, labels: int, predictions: int, seed: int, *, score_digits: int = 2) -> tuple[DetectionColumns, ...]:
    """Labels and predictions: half of the predictions are shaken labels, scores are rounded so that many are equal."""
    rng = np.random.default_rng(seed)
    tokens = tuple(f"{i:032x}" for i in range(samples))
    ego = np.concatenate([rng.uniform(-1000, 1000, (samples, 2)), np.zeros((samples, 1))], axis=1)
    truth = _random(rng, tokens, ego, labels)
    found = _random(rng, tokens, ego, predictions)
    copies = min(labels, predictions // 2)
    rows = np.concatenate([np.arange(copies) + i * predictions for i in range(samples)])
    source = np.concatenate([np.arange(copies) + i * labels for i in range(samples)])
    found.translation[rows] = truth.translation[source] + rng.normal(0, 0.7, (len(rows), 3))
    found.label[rows] = truth.label[source]
    found.size[rows] = truth.size[source] * rng.uniform(0.8, 1.25, (len(rows), 3))
    found.attribute[rows] = np.where(rng.random(len(rows)) < 0.6, truth.attribute[source], found.attribute[rows])
    found.score[:] = np.round(rng.random(len(found)), score_digits)
    found.num_points[:] = -1
    return truth, found


def _random(rng: np.random.Generator, tokens: tuple[str, ...], ego: np.ndarray, per_sample: int) -> DetectionColumns:
    count = len(tokens) * per_sample
    sample = np.repeat(np.arange(len(tokens)), per_sample)
    label = rng.choice(len(CLASSES), count, p=[0.4, 0.08, 0.04, 0.04, 0.02, 0.2, 0.04, 0.03, 0.1, 0.05])
    attribute = np.full(count, -1)
    for index, name in enumerate(CLASSES):
        rows, known = np.flatnonzero(label == index), ATTRIBUTES_OF.get(name, VEHICLE_ATTRIBUTES)
        if known:
            attribute[rows] = rng.choice((*known, -1), len(rows))
    velocity = rng.normal(0, 3, (count, 2))
    velocity[rng.random(count) < 0.05] = np.nan
    return DetectionColumns(
        samples=tokens,
        sample=sample,
        translation=ego[sample] + rng.uniform(-45, 45, (count, 3)) * (1, 1, 0.02),
        size=rng.uniform(0.4, 6, (count, 3)),
        rotation=rotation_of_yaw(rng.uniform(-np.pi, np.pi, count)),
        velocity=velocity,
        label=label,
        score=np.full(count, -1.0),
        attribute=attribute,
        num_points=rng.integers(0, 12, count),
        ego=ego,
    )


def write_labels(path: Path, truth: DetectionColumns) -> None:
    """Labels as a file in the submission's layout, with points per box and ego positions beside the boxes."""
    results: dict[str, list[dict[str, object]]] = {token: [] for token in truth.samples}
    for row in range(len(truth)):
        length, width, height = truth.size[row].tolist()
        token = truth.samples[truth.sample[row]]
        results[token].append(
            {
                "sample_token": token,
                "translation": truth.translation[row].tolist(),
                "size": [width, length, height],
                "rotation": truth.rotation[row].tolist(),
                "velocity": truth.velocity[row].tolist(),
                "detection_name": CLASSES[truth.label[row]],
                "attribute_name": ATTRIBUTES[truth.attribute[row]] if truth.attribute[row] >= 0 else "",
                "num_lidar_pts": int(truth.num_points[row]),
                "num_pts": int(truth.num_points[row]),
            }
        )
    places = dict(zip(truth.samples, truth.ego.tolist(), strict=True))
    path.write_text(json.dumps({"results": results, "ego_translation": places}))
