"""Which official split a nuScenes scene belongs to (facts of the dataset, as its scene lists give them)."""

from __future__ import annotations

_MINI_VAL = frozenset({"scene-0103", "scene-0916"})

# The 150 validation scenes of v1.0-trainval as runs of numbers, both ends included; its other scenes are for training.
_TRAINVAL_VAL_RUNS = (
    (3, 3), (12, 18), (35, 36), (38, 39), (92, 110), (221, 221), (268, 278), (329, 332), (344, 346), (519, 524), (552, 565),
    (625, 627), (629, 630), (632, 638), (770, 771), (775, 775), (777, 778), (780, 784), (794, 800), (802, 802), (904, 917),
    (919, 931), (962, 963), (966, 969), (971, 972), (1059, 1073),
)  # fmt: skip
_TRAINVAL_VAL = frozenset(f"scene-{number:04d}" for first, last in _TRAINVAL_VAL_RUNS for number in range(first, last + 1))


def official_split(version: str, scene: str) -> str:
    """``train``, ``val`` or ``test``: the official split of a scene; ``train`` for scenes and versions not known here."""
    if version == "v1.0-test":
        return "test"
    val = {"v1.0-mini": _MINI_VAL, "v1.0-trainval": _TRAINVAL_VAL}.get(version, frozenset())
    return "val" if scene in val else "train"
