"""Trains the town teacher: a small MinkUNet on synthetic towns with their labels.

    python tools/train_town_teacher.py --minutes 12

Its towns (seeds from 1,000,000) are never those of the demo or the tests. Besides the 32 categories the features must tell
the height of a cell, so that they do not shrink to one point per class.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from picture3d.datasets.label_sets import label_set
from picture3d.evaluation.segmentation import ConfusionMatrix
from picture3d.models.minkunet import build_unet_maps
from picture3d.ops.quantize import quantise_points
from picture3d.synthetic.drive import DriveConfig, drive
from picture3d.teachers.town.teacher import QUANTISATION, WEIGHTS, town_network

TRAIN_SEED, HELD_OUT_SEED = 1_000_000, 1_500_000
TEMPERATURE = 12.0


@dataclass(frozen=True)
class Scan:
    xyz: Tensor  # (N, 3) float32
    intensity: Tensor  # (N,) float32, 0..1
    label: Tensor  # (N,) int64, 32 categories


def scans(first_seed: int, towns: int, per_town: int) -> list[Scan]:
    config = DriveConfig(keyframes=per_town, sweeps_per_keyframe=0, keyframe_gap_s=2.0)
    found = []
    for seed in range(first_seed, first_seed + towns):
        for step in drive(seed, config):
            points = step.sweep.points
            label = torch.from_numpy(step.sweep.labels.astype(np.int64))
            found.append(Scan(torch.from_numpy(points.xyz), torch.from_numpy(points.intensity / np.float32(255)), label))
    return found


def cells_of(scan: Scan, rng: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells (M, 3), intensity (M, 1), label (M,) and height in metres (M,); augmented if `rng` is given."""
    xyz, intensity = scan.xyz, scan.intensity
    if rng is not None:
        angle, size = rng.uniform(-np.pi, np.pi), rng.uniform(0.93, 1.07)
        c, s = np.cos(angle), np.sin(angle)
        flip = rng.choice([-1.0, 1.0])
        turn = torch.tensor([[c, -s * flip, 0], [s, c * flip, 0], [0, 0, 1]], dtype=torch.float32) * size
        xyz = xyz @ turn.t() + torch.tensor([0.0, 0.0, rng.normal(0, 0.1)], dtype=torch.float32)
        # Real sensors do not share the simulated one's reflectances: lean on shape.
        intensity = intensity * rng.uniform(0.4, 1.6) if rng.random() > 0.25 else torch.zeros_like(intensity)
        kept = torch.from_numpy(rng.random(len(xyz)) > rng.uniform(0, 0.3))
        xyz, intensity, label = xyz[kept], intensity[kept], scan.label[kept]
    else:
        label = scan.label
    quantised = quantise_points(xyz, QUANTISATION)
    first = quantised.representative
    return quantised.cells, intensity[first, None].clamp(0, 1), label[first], xyz[first, 2]


def batch_of(chosen: list[Scan], rng: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [cells_of(scan, rng) for scan in chosen]
    coords = torch.cat([torch.cat([torch.full_like(p[0][:, :1], i), p[0]], 1) for i, p in enumerate(parts)])
    return coords, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), torch.cat([p[3] for p in parts])


class Heads(nn.Module):
    """Thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(32, 64))
        self.height = nn.Linear(64, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return TEMPERATURE * features @ F.normalize(self.prototypes, dim=1).t(), self.height(features).squeeze(1)


def assess(network: nn.Module, heads: Heads, held_out: list[Scan]) -> dict[str, float]:
    """Per-cell scores on towns that were not trained on, and how the features are spread."""
    network.eval()
    labels = label_set("nuscenes-32")
    confusion = ConfusionMatrix(labels.train_names)
    kept, kinds = [], []
    with torch.inference_mode():
        for scan in held_out:
            coords, intensity, label, _ = batch_of([scan], None)
            features = network(intensity, build_unet_maps(coords))
            predicted = labels.to_train(heads(features)[0].argmax(1).numpy().astype(np.uint8))
            truth = labels.to_train(label.numpy().astype(np.uint8))
            confusion.add(truth, np.maximum(predicted, 1))
            rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:500]
            kept.append(features[rows])
            kinds.append(torch.from_numpy(truth.astype(np.int64))[rows])
    features, kind = torch.cat(kept), torch.cat(kinds)
    cosine = features @ features.t()
    same = kind[:, None] == kind[None]
    same.fill_diagonal_(False)
    spectrum = torch.linalg.svdvals(features - features.mean(0))
    share = spectrum / spectrum.sum()
    network.train()
    return {
        "miou": round(confusion.scores().miou or 0.0, 4),
        "cosine_within_class": round(float(cosine[same].mean()), 4),
        "cosine_between_classes": round(float(cosine[kind[:, None] != kind[None]].mean()), 4),
        "effective_rank": round(float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum())), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="training time; scanning comes on top")
    parser.add_argument("--towns", type=int, default=60)
    parser.add_argument("--per-town", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.time()
    train = scans(TRAIN_SEED, args.towns, args.per_town)
    held_out = scans(HELD_OUT_SEED, 6, 3)
    print(f"{len(train)} scans to train on, {len(held_out)} held out, {time.time() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(0 if args.start is None else 1)
    network, heads = town_network(), Heads()
    if args.start is not None:
        network.load_state_dict({n: v.float() if v.is_floating_point() else v for n, v in load_file(args.start).items()})
    counts = torch.bincount(torch.cat([scan.label for scan in train]), minlength=32).double()
    weight = torch.where(counts > 0, (counts.clamp(min=1).sum() / counts.clamp(min=1)) ** 0.3, 0.0).float()
    weight = weight / (weight * counts.float()).sum() * counts.float().sum()
    optimiser = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=4e-3, weight_decay=0.01)
    start, step, losses = time.time(), 0, []
    while (spent := (time.time() - start) / (60 * args.minutes)) < 1:
        # The schedule follows the clock: a rise over the first twentieth, then a cosine to zero.
        rate = 4e-3 * min(1.0, spent / 0.05 + 0.02) * 0.5 * (1 + np.cos(np.pi * spent))
        for group in optimiser.param_groups:
            group["lr"] = rate
        coords, intensity, label, height = batch_of([train[i] for i in rng.choice(len(train), 2, replace=False)], rng)
        logits, guess = heads(network(intensity, build_unet_maps(coords)))
        loss = F.cross_entropy(logits, label, weight=weight) + 0.1 * F.smooth_l1_loss(guess, height)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {time.time() - start:.0f} s, loss {np.mean(losses[-100:]):.3f}", flush=True)
        if step % 500 == 0:
            print(json.dumps(assess(network, heads, held_out[:6])), flush=True)
    scores = assess(network, heads, held_out)
    tensors = {n: v.half().contiguous() if v.is_floating_point() else v for n, v in network.state_dict().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out)
    print(json.dumps({"steps": step, "seconds": round(time.time() - start), **scores, "bytes": args.out.stat().st_size}))


if __name__ == "__main__":
    main()
