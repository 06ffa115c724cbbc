from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picture3d.errors import ConfigError
from picture3d.pretrain.masking import (
    ClassStatistics,
    MaskConfig,
    choose_hidden,
    class_ratios,
    class_statistics,
    draw,
    hidden_counts,
    inter_class_groups,
    intra_class_coefficient,
    scaled_to,
)
from tests.sample_data import golden_files

LITERAL = MaskConfig(intra_class="literal", min_ratio=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_sample(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def unit_rows(count: int, width: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator(seed)), dim=1)


def statistics_with(size: list[int], dispersion: list[float], seed: int = 0) -> ClassStatistics:
    centres = unit_rows(len(size), 16, seed)[None]
    return ClassStatistics(centres, torch.tensor([size]), torch.tensor([dispersion]))


# --- the published formula, in plain loops ----------------------------------------------------------------------------


def greedy_groups(centres: np.ndarray, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    unit = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    remaining, groups = list(range(len(centres))), []
    for size in sizes:
        best, best_score = None, -np.inf
        for subset in itertools.combinations(remaining, size):
            pairs = [1 - unit[i] @ unit[j] for i, j in itertools.combinations(subset, 2)]
            score = float(np.mean(pairs)) if pairs else 0.0
            if score > best_score:
                best, best_score = subset, score
        assert best is not None
        groups.append(best)
        remaining = [i for i in remaining if i not in best]
    return groups


def published_counts(features: np.ndarray, labels: np.ndarray, config: MaskConfig) -> np.ndarray:
    k = config.num_clusters
    features = features.astype(np.float64)
    centres = np.stack([features[labels == i].mean(0) for i in range(k)])
    dispersion = np.zeros(k)
    for i in range(k):
        distance = np.linalg.norm(features[labels == i] - centres[i], axis=1)
        kept = distance[distance > config.dispersion_threshold]
        if len(kept):
            dispersion[i] = kept.mean() if config.intra_class == "literal" else kept.sum() / len(distance)
    coefficient = 1 - dispersion / dispersion.max() if dispersion.max() > 0 else np.ones(k)
    counts = np.zeros(k, np.int64)
    for group, base in zip(greedy_groups(centres, config.group_sizes), config.group_ratios, strict=True):
        for i in group:
            counts[i] = int(np.floor((labels == i).sum() * base * coefficient[i] + 1e-6))
    return counts


def hidden_per_class(hidden: Tensor, labels: Tensor, k: int = 8) -> list[int]:
    return [int(hidden[labels == i].sum()) for i in range(k)]


@pytest.mark.parametrize("intra_class", ["literal", "per_member"])
@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_the_formula_in_plain_loops(intra_class: str, seed: int):
    config = MaskConfig.from_tree({"intra_class": intra_class, "min_ratio": 0.0})
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 8, 700)
    labels[:8] = range(8)
    spread = rng.uniform(0.05, 0.25, 8)[labels, None]
    features = rng.standard_normal((8, 32))[labels] / 5 + spread * rng.standard_normal((700, 32))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    superclass = torch.from_numpy(labels)
    hidden = choose_hidden(torch.from_numpy(features), superclass, one_sample(700), 1, config, generator(seed))
    assert hidden_per_class(hidden, superclass) == published_counts(features, labels, config).tolist()


@given(st.integers(0, 10_000), st.sampled_from([(3, 3, 2), (2, 2, 2, 2), (1, 7), (8,), (5, 1, 2)]))
@settings(max_examples=60, deadline=None)
def test_groups_equal_a_search_in_plain_loops(seed: int, sizes: tuple[int, ...]):
    centres = unit_rows(8, 6, seed)
    group = inter_class_groups(centres[None], torch.ones(1, 8, dtype=torch.bool), sizes)[0]
    for index, members in enumerate(greedy_groups(centres.double().numpy(), sizes)):
        assert tuple((group == index).nonzero().squeeze(1).tolist()) == members


def test_samples_of_a_batch_are_grouped_independently():
    centres = torch.stack([unit_rows(8, 6, seed) for seed in range(7)])
    together = inter_class_groups(centres, torch.ones(7, 8, dtype=torch.bool), (3, 3, 2))
    alone = [inter_class_groups(c[None], torch.ones(1, 8, dtype=torch.bool), (3, 3, 2))[0] for c in centres]
    assert torch.equal(together, torch.stack(alone))


def test_the_first_subset_wins_among_equally_distinct_ones():
    group = inter_class_groups(torch.eye(8)[None], torch.ones(1, 8, dtype=torch.bool), (3, 3, 2))
    assert group.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def test_superclasses_without_members_are_grouped_last():
    centres = unit_rows(8, 6, 3)
    present = torch.tensor([False, True, False, True, True, False, True, True])
    group = inter_class_groups((centres * present[:, None])[None], present[None], (3, 3, 2))[0]
    assert sorted(group[present].tolist()) == [0, 0, 0, 1, 1]
    expected = greedy_groups(centres[present].double().numpy(), (3, 2))[0]
    assert tuple((group[present] == 0).nonzero().squeeze(1).tolist()) == expected


# --- reference numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files("openpcdet", "i2mask"))
def test_golden_groups_dispersion_and_counts(path: Path):
    with np.load(path) as stored:
        golden = dict(stored)
    features, superclass = torch.from_numpy(golden["features"]), torch.from_numpy(golden["labels"]).long()
    found = class_statistics(features, superclass, one_sample(len(features)), 1, LITERAL)
    np.testing.assert_array_equal(found.size[0], golden["cluster_size"])
    np.testing.assert_allclose(found.centres[0], golden["centres"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.dispersion[0], golden["d_intra"], rtol=1e-5, atol=1e-5)
    group = inter_class_groups(found.centres, found.size > 0, LITERAL.group_sizes)[0]
    for index in range(3):
        assert sorted(golden[f"partition{index}"].tolist()) == (group == index).nonzero().squeeze(1).tolist()
    if golden["d_intra"].max() > 0:
        coefficient, ratio, counts = golden["r_c"], golden["ratio"], golden["num_masked"]
    else:  # the reference divides 0 by 0 here; our rule is coefficient 1
        coefficient, ratio = np.ones(8), golden["base_ratio"]
        counts = np.floor(golden["cluster_size"] * golden["base_ratio"].astype(np.float64).round(6) + 1e-6)
    np.testing.assert_allclose(intra_class_coefficient(found.dispersion)[0], coefficient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(class_ratios(found, LITERAL)[0], ratio, rtol=1e-5, atol=1e-5)
    hidden = choose_hidden(features, superclass, one_sample(len(features)), 1, LITERAL, generator())
    assert hidden_per_class(hidden, superclass) == counts.tolist()


# --- rounding, the draw -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ratio", "count"), [(200, 0.9, 180), (10, 0.45, 4), (1, 0.9, 0), (0, 0.9, 0), (20, 0.45, 9)])
def test_counts_round_down_but_not_because_of_the_product(size: int, ratio: float, count: int):
    assert hidden_counts(torch.tensor([size]), torch.tensor([ratio], dtype=torch.float64)).item() == count


def test_every_count_up_to_a_thousand_is_the_exact_floor():
    size = torch.arange(1001)
    for hundredths in (12, 33, 45, 61, 74, 87, 90):
        found = hidden_counts(size, torch.full((1001,), hundredths / 100, dtype=torch.float64))
        assert torch.equal(found, size * hundredths // 100)


def test_the_draw_hides_exactly_the_count_of_every_class_and_never_class_minus_one():
    superclass = torch.randint(-1, 3, (500,), generator=generator(1))
    sample = torch.randint(0, 2, (500,), generator=generator(2)).sort().values
    counts = torch.tensor([[5, 0, 17], [30, 2, 1]])
    hidden = draw(counts, superclass, sample, generator(3))
    assert not hidden[superclass < 0].any()
    for b, k in itertools.product(range(2), range(3)):
        assert hidden[(sample == b) & (superclass == k)].sum() == counts[b, k]


def test_the_draw_is_a_function_of_the_generator_and_uniform():
    superclass = one_sample(10)
    first = draw(torch.tensor([[4]]), superclass, one_sample(10), generator(7))
    assert torch.equal(first, draw(torch.tensor([[4]]), superclass, one_sample(10), generator(7)))
    source = generator(8)
    often = torch.stack([draw(torch.tensor([[4]]), superclass, one_sample(10), source) for _ in range(3000)]).float().mean(0)
    assert (often - 0.4).abs().max() < 0.05  # five standard deviations


# --- what the formula hides, and its edges ----------------------------------------------------------------------------


def test_a_single_loose_superclass_is_never_hidden_by_the_formula():
    ratio = class_ratios(statistics_with([100] * 8, [0.7, 0, 0, 0, 0, 0, 0, 0]), LITERAL)
    assert ratio[0, 0] == 0
    assert ratio.max() == 0.9


def test_equal_dispersions_fall_back_to_the_base_ratios():
    statistics = statistics_with([100] * 8, [0.8] * 8)
    assert class_ratios(statistics, LITERAL).sum() == 0
    share = class_ratios(statistics, LITERAL.model_copy(update={"min_ratio": 0.1}))
    assert sorted(share[0].tolist()) == [0, 0, 0.45, 0.45, 0.45, 0.9, 0.9, 0.9]


def test_each_sample_falls_back_by_itself():
    equal, varied = statistics_with([50] * 8, [0.8] * 8), statistics_with([50] * 8, [0.0] * 7 + [0.8])
    both = ClassStatistics(
        torch.cat([equal.centres, varied.centres]),
        torch.cat([equal.size, varied.size]),
        torch.cat([equal.dispersion, varied.dispersion]),
    )
    config = MaskConfig(intra_class="literal", min_ratio=0.1)
    assert torch.equal(class_ratios(both, config), torch.cat([class_ratios(equal, config), class_ratios(varied, config)]))
    assert class_ratios(both, config)[1, 7] == 0


def test_all_features_equal_hide_the_base_ratio_of_the_first_group():
    features = unit_rows(1, 16, 0).expand(40, 16)
    hidden = choose_hidden(features, one_sample(40), one_sample(40), 1, MaskConfig(), generator())
    assert hidden.sum() == 36


@pytest.mark.parametrize("count", range(10))
def test_any_number_of_voxels_works(count: int):
    features, superclass = unit_rows(count, 16, count), torch.arange(count) % 8
    hidden = choose_hidden(features, superclass, one_sample(count), 1, MaskConfig(), generator())
    assert hidden.shape == (count,)


def test_an_empty_sample_between_two_full_ones_is_skipped():
    features = unit_rows(160, 16, 0)
    superclass, sample = torch.arange(160) % 8, torch.arange(160) // 80 * 2
    hidden = choose_hidden(features, superclass, sample, 4, MaskConfig(min_ratio=0.1), generator())
    assert hidden[sample == 0].any()
    assert hidden[sample == 2].any()


@pytest.mark.parametrize("kind", ["i2mask", "random"])
def test_voxels_without_a_target_stay_visible_and_out_of_the_statistics(kind: str):
    config = MaskConfig.from_tree({"kind": kind})
    features, superclass = unit_rows(90, 16, 0), torch.arange(90) % 9 - 1
    poisoned = torch.where((superclass < 0)[:, None], torch.nan, features)
    hidden = choose_hidden(poisoned, superclass, one_sample(90), 1, config, generator())
    assert not hidden[superclass < 0].any()
    assert hidden.any()
    known = superclass >= 0
    alone = choose_hidden(features[known], superclass[known], one_sample(80), 1, config, generator(1))
    assert hidden.sum() == alone.sum()


def test_random_hides_its_ratio_of_every_sample_without_a_teacher():
    sample = torch.tensor([0] * 10 + [2] * 31)
    hidden = choose_hidden(None, one_sample(41), sample, 4, MaskConfig(kind="random", random_ratio=0.7), generator())
    assert [int(hidden[sample == b].sum()) for b in range(4)] == [7, 0, 21, 0]


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_or_everything_can_be_hidden(ratio: float):
    hidden = choose_hidden(None, one_sample(9), one_sample(9), 1, MaskConfig(kind="random", random_ratio=ratio), generator())
    assert hidden.float().mean() == ratio


def test_i2mask_without_a_teacher_says_what_to_do():
    with pytest.raises(ConfigError, match="picture3d targets"):
        choose_hidden(None, one_sample(3), one_sample(3), 1, MaskConfig(), generator())


# --- matched realised ratio -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6, 0.75])
@pytest.mark.parametrize("intra_class", ["literal", "per_member", "off"])
def test_the_target_ratio_is_reached_to_one_voxel_per_class(target: float, intra_class: str):
    config = MaskConfig.from_tree({"intra_class": intra_class, "target_ratio": target})
    superclass = torch.randint(0, 8, (1000,), generator=generator(4))
    features = unit_rows(8, 16, 1)[superclass] + 0.2 * torch.randn(1000, 16, generator=generator(5))
    hidden = choose_hidden(features, superclass, one_sample(1000), 1, config, generator())
    assert 1000 * target - 8 <= hidden.sum() <= 1000 * target + 1


def test_scaling_keeps_the_order_of_the_classes():
    ratio = torch.tensor([[0.9, 0.61, 0.45, 0.12, 0.0, 0.0]], dtype=torch.float64)
    size = torch.tensor([[10, 20, 30, 40, 50, 60]])
    for target in (0.01, 0.1, 0.3, 0.6, 0.9, 1.0):
        scaled = scaled_to(ratio, size, target)
        assert (scaled.diff(dim=1) <= 1e-12).all()
        assert (scaled * size).sum() / size.sum() == pytest.approx(target, abs=1e-6)
    assert scaled_to(torch.zeros(1, 6, dtype=torch.float64), size, 0.5)[0].tolist() == pytest.approx([0.5] * 6)


def test_scaling_a_sample_without_voxels_is_harmless():
    scaled = scaled_to(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.int64), 0.5)
    assert scaled.isfinite().all()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_groups_must_add_up_to_the_superclasses():
    with pytest.raises(ConfigError, match="add up to 8"):
        MaskConfig.from_tree({"num_clusters": 10})
    with pytest.raises(ConfigError, match="3 groups"):
        MaskConfig.from_tree({"group_ratios": [0.9, 0.45]})
    with pytest.raises(ConfigError, match="kind"):
        MaskConfig.from_tree({"kind": "blocks"})


def test_other_numbers_of_superclasses_work():
    config = MaskConfig(num_clusters=5, group_sizes=(2, 3), group_ratios=(0.8, 0.2), intra_class="off", min_ratio=0)
    hidden = choose_hidden(unit_rows(100, 8, 0), torch.arange(100) % 5, one_sample(100), 1, config, generator())
    assert hidden.sum() == 2 * 16 + 3 * 4
