"""Greedy choices against brute force and by their defining properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quota.core.errors import UsageError
from quota.models import find_family
from quota.models.images import ImageInfo, ImageTokens, image_digest
from quota.prune import greedy
from tests.tiny import tiny_qwen


def points(n: int = 14, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def scores(n: int = 14, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(n).astype(np.float32)


def test_cosines_are_whole_numbers_near_the_cosine() -> None:
    x = points(20, 300)
    c = greedy.cosines(x)
    assert np.array_equal(c, np.round(c)) and np.abs(c).max() < 2**53
    want = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1).numpy()
    np.testing.assert_allclose(c / greedy.ONE, want, atol=1e-5)
    assert np.isfinite(greedy.cosines(torch.zeros(3, 4))).all()


def test_cosines_do_not_depend_on_the_order_of_summation() -> None:
    """Shuffling the dimensions changes every partial sum; whole numbers below 2^53 add up to the same all the same."""
    x = points(30, 513, seed=3)
    norm = greedy.row_norm(x)
    order = torch.randperm(513, generator=torch.Generator().manual_seed(0))
    shuffled = x[:, order]
    assert torch.equal(greedy.row_norm(shuffled), norm)
    assert np.array_equal(greedy.cosines(x), greedy.cosines(shuffled))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = greedy.cosines(x)
        torch.set_num_threads(2)
        assert np.array_equal(alone, greedy.cosines(x))
    finally:
        torch.set_num_threads(before)


def test_topk_is_stable() -> None:
    assert greedy.topk(np.array([1, 3, 3, 2], np.float32), 2).tolist() == [1, 2]


def test_maxmin_starts_at_the_loneliest_and_is_greedy() -> None:
    c = greedy.cosines(points())
    d = greedy.ONE - c
    apart = d + np.where(np.eye(len(d), dtype=bool), np.inf, 0)
    chosen = greedy.maxmin(c, 6)
    assert chosen[0] == int(np.argmax(apart.min(1)))
    for step in range(1, 6):
        nearest = {i: min(d[i, j] for j in chosen[:step]) for i in range(len(d)) if i not in chosen[:step]}
        assert nearest[chosen[step]] == max(nearest.values())


def test_maxmin_spreads_where_topk_does_not() -> None:
    """Two tight clusters, all large scores in one of them: top-k takes one cluster, diversity both."""
    x = torch.cat(
        [points(6, 4) * 0.01 + torch.tensor([1.0, 0, 0, 0]), points(6, 4) * 0.01 + torch.tensor([0, 1.0, 0, 0])]
    )
    s = np.r_[np.ones(6), np.zeros(6)].astype(np.float32)
    assert set(greedy.topk(s, 4).tolist()) <= set(range(6))
    assert {i // 6 for i in greedy.maxmin(greedy.cosines(x), 2)} == {0, 1}
    assert {i // 6 for i in greedy.mmr(s, greedy.cosines(x), 2, 0.4)} == {0, 1}


def test_kcenter_is_greedy_in_distance_times_score() -> None:
    c, s = greedy.cosines(points()), scores()
    weight = ((s - s.min()) / (s.max() - s.min())).astype(np.float64) ** 0.75
    chosen = greedy.kcenter(s, c, 6)
    assert chosen[0] == int(np.argmax(s))
    for step in range(1, 6):
        gain = {
            i: weight[i] * min(greedy.ONE - c[i, j] for j in chosen[:step])
            for i in range(len(s))
            if i not in chosen[:step]
        }
        assert gain[chosen[step]] >= max(gain.values()) * (1 - 1e-12)
    assert greedy.kcenter(np.ones_like(s), c, 6) == greedy.farthest(greedy.ONE - c, 6, 0)


def test_mmr_ends_are_topk_and_diversity() -> None:
    c, s = greedy.cosines(points()), scores()
    assert greedy.mmr(s, c, 5, 1.0) == greedy.topk(s, 5).tolist()
    chosen = greedy.mmr(s, c, 5, 0.5)
    value = greedy.scaled(s)
    for step in range(1, 5):
        gain = {
            i: 0.5 * value[i] - 0.5 * max(c[i, j] for j in chosen[:step]) / greedy.ONE
            for i in range(len(s))
            if i not in chosen[:step]
        }
        assert gain[chosen[step]] == pytest.approx(max(gain.values()), abs=1e-12)


def test_dpp_is_the_greedy_determinant() -> None:
    x, s = points(9, 12), scores(9)
    c = greedy.cosines(x) / greedy.ONE
    r = greedy.scaled(s) + 1e-6
    kernel = r[:, None] * c * r[None]
    chosen: list[int] = []
    for _ in range(5):
        gains = {i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) for i in range(9) if i not in chosen}
        chosen.append(max(gains, key=lambda i: gains[i]))
    assert greedy.dpp(s, greedy.cosines(x), 5) == chosen
    best = max(itertools.combinations(range(9), 2), key=lambda p: np.linalg.det(kernel[np.ix_(p, p)]))
    assert len(set(best) & set(greedy.dpp(s, greedy.cosines(x), 2))) >= 1


def test_dpp_goes_on_by_score_beyond_the_rank() -> None:
    x, s = points(10, 3), scores(10)
    chosen = greedy.dpp(s, greedy.cosines(x), 8)
    assert len(set(chosen)) == 8
    left = [i for i in range(10) if i not in chosen[:3]]
    assert chosen[3:] == sorted(left, key=lambda i: -s[i])[:5]


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (12, 12), (1, 7), (7, 1), (10, 31), (30, 8)])
def test_even_sites_are_distinct_and_even(rows: int, columns: int) -> None:
    for count in {1, 2, 3, rows * columns // 10, rows * columns // 3, rows * columns - 1, rows * columns} - {0}:
        sites = greedy.even_sites(rows, columns, count)
        assert len(set(sites)) == len(sites) == count
        assert all(0 <= r < rows and 0 <= c < columns for r, c in sites)
        left = sum(2 * c + 1 < columns for _, c in sites) - sum(2 * c + 1 > columns for _, c in sites)
        top = sum(2 * r + 1 < rows for r, _ in sites) - sum(2 * r + 1 > rows for r, _ in sites)
        assert abs(left) <= rows + 1 and abs(top) <= columns + 1, (
            "no side of the picture is preferred by more than one site a line"
        )
    assert greedy.even_sites(24, 24, 144) == [(2 * i + 1, 2 * j + 1) for i in range(12) for j in range(12)]


def test_grid_covers_the_picture_and_fills_by_score() -> None:
    places = np.array([(0, r, c) for r in range(6) for c in range(6)], dtype=np.int64)
    s = scores(36)
    assert sorted(greedy.grid(s, places, [(6, 6)], 9, 1.0)) == [6 * r + c for r in (1, 3, 5) for c in (1, 3, 5)]
    half = greedy.grid(s, places, [(6, 6)], 8, 0.5)
    assert half[:4] == greedy.grid(s, places, [(6, 6)], 4, 1.0)
    rest = [i for i in range(36) if i not in half[:4]]
    assert half[4:] == sorted(rest, key=lambda i: -s[i])[:4]
    alive = places[::3]  # what an earlier stage left: each site takes its nearest living token
    assert len(set(greedy.grid(s[::3], alive, [(6, 6)], 9, 1.0))) == 9


def test_grid_serves_every_picture() -> None:
    places = np.array([(p, r, c) for p, n in enumerate((4, 4, 2)) for r in range(n) for c in range(n)], dtype=np.int64)
    chosen = greedy.grid(scores(36), places, [(4, 4), (4, 4), (2, 2)], 18, 1.0)
    assert [sum(1 for i in chosen if places[i, 0] == p) for p in range(3)] == [8, 8, 2]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(0, 1000), st.booleans())
def test_every_policy_gives_distinct_tokens_of_the_asked_number(n: int, seed: int, equal: bool) -> None:
    x = torch.ones(n, 4) if equal else points(n, 4, seed)
    s = np.ones(n, np.float32) if equal else scores(n, seed)
    c = greedy.cosines(x)
    places = np.array([(0, i // 5, i % 5) for i in range(n)], dtype=np.int64)
    for keep in {1, n // 2, n} - {0}:
        for chosen in (
            greedy.maxmin(c, keep),
            greedy.kcenter(s, c, keep),
            greedy.mmr(s, c, keep, 0.5),
            greedy.dpp(s, c, keep),
            greedy.grid(s, places, [(4, 5)], keep, 0.3),
        ):
            assert len(set(chosen)) == len(chosen) == keep and all(0 <= i < n for i in chosen)
            assert not equal or keep != n or sorted(chosen) == list(range(n))


def test_ties_go_to_the_lower_index() -> None:
    c, s = greedy.cosines(torch.ones(5, 3)), np.ones(5, np.float32)
    for chosen in (greedy.maxmin(c, 2), greedy.kcenter(s, c, 2), greedy.mmr(s, c, 2, 0.5), greedy.dpp(s, c, 2)):
        assert sorted(chosen) == [0, 1]


def test_random_scores_belong_to_the_picture() -> None:
    number, place = np.zeros(16, np.int64), np.arange(16)
    first = greedy.random_scores(0, ["a"], number, place)
    assert np.array_equal(greedy.random_scores(0, ["b", "a"], number + 1, place), first)
    assert not np.array_equal(greedy.random_scores(1, ["a"], number, place), first)
    assert not np.array_equal(greedy.random_scores(0, ["b"], number, place), first)
    many = np.concatenate(
        [greedy.random_scores(0, [f"{i}"], np.zeros(576, np.int64), np.arange(576)) for i in range(20)]
    )
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.std() - 12**-0.5) < 0.01


def test_pictures_know_their_places() -> None:
    picture = torch.full((2, 12), -1)
    picture[0, 1:5], picture[0, 6:12], picture[1, 8:12] = 0, 1, 0
    shown = [ImageInfo("a"), ImageInfo("b", (2, 3)), ImageInfo("c")]
    p = ImageTokens.of(picture, shown)
    assert (
        p.number[0, 6:10].tolist() == [1] * 4
        and p.place[0, 6:12].tolist() == list(range(6))
        and p.place[0, 1:5].tolist() == [0, 1, 2, 3]
    )
    assert p.grids == [[(2, 2), (2, 3)], [(2, 2)]] and p.digests == [["a", "b"], ["c"]]
    repeated = ImageTokens.of(picture.repeat_interleave(2, 0), shown)
    assert repeated.digests == [["a", "b"], ["a", "b"], ["c"], ["c"]]
    with pytest.raises(UsageError, match="the prompt has 3 images, 2 were encoded"):
        ImageTokens.of(picture, shown[:2])
    unseen = ImageTokens.of(picture)
    assert unseen.grids == [[(2, 2), (1, 6)], [(2, 2)]] and unseen.digests is None
    assert ImageTokens.of(torch.full((2, 3), -1), []).grids == [[], []]


def test_digests_do_not_depend_on_the_float_dtype() -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert [image_digest(p) for p in pixels] == [image_digest(p) for p in pixels.bfloat16()]
    assert image_digest(pixels[0]) != image_digest(pixels[1])


def test_pictures_of_dynamic_resolution_are_told_apart_by_their_grids() -> None:
    patches = torch.rand(4 * 6 + 2 * 2, 8, generator=torch.Generator().manual_seed(0))
    family = find_family(tiny_qwen())
    given = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}
    first, second = (family.shown(image)[0] for image in family.images(given))
    assert first == ImageInfo(image_digest(patches[:24]), (2, 3)) and second == ImageInfo(
        image_digest(patches[24:]), (1, 1)
    )
