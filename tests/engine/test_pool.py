"""Random operation sequences against a plain dictionary, and plans against the pruner's rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from quota.core.errors import RecipeError, UsageError
from quota.models.images import ImageIndex
from quota.runtime.engine.pool import OutOfPages, PagePool
from quota.runtime.engine.segments import Segments, at_budget, plan_prompt
from tests.prune.recipes import recipe_for
from tests.tiny import tiny_llava

UNITS, LAYERS = 13, (1, 2, 3)


class PoolMachine(RuleBasedStateMachine):
    """The model: which blocks each hold covers, and for each key the blocks that hold its content until they are
    given to someone else."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(UNITS, LAYERS)
        self.pages: list = []
        self.content: dict[bytes, tuple[int, ...]] = {}

    def _taken(self) -> set[int]:
        return {block for page in self.pages for block in page.blocks}

    @rule(target=holds, segment=st.integers(0, len(LAYERS) - 1))
    def allocate(self, segment):
        taken = self._taken()
        if UNITS - len(taken) < LAYERS[segment]:
            with pytest.raises(OutOfPages):
                self.pool.allocate(segment)
            return None
        page = self.pool.allocate(segment)
        assert len(page.blocks) == LAYERS[segment] and not taken & set(page.blocks)
        self.content = {key: blocks for key, blocks in self.content.items() if not set(blocks) & set(page.blocks)}
        self.pages.append(page)
        return page

    @rule(page=holds, key=st.integers(0, 5))
    def publish(self, page, key):
        if page is None or page not in self.pages:
            return
        name = bytes([key])
        if page.key is None and name not in self.content:
            self.content[name] = page.blocks
        self.pool.publish(page, name)

    @rule(target=holds, key=st.integers(0, 5))
    def acquire(self, key):
        page = self.pool.acquire(bytes([key]))
        assert (page is None) == (bytes([key]) not in self.content)
        if page is not None:
            assert page.blocks == self.content[bytes([key])]
            self.pages.append(page)
        return page

    @rule(page=consumes(holds))
    def release(self, page):
        if page is not None:
            self.pages.remove(page)
            self.pool.release(page)

    @rule()
    def forget(self):
        self.pool.forget()
        taken = self._taken()
        self.content = {key: blocks for key, blocks in self.content.items() if set(blocks) & taken}

    @invariant()
    def nothing_is_lost(self):
        self.pool.check_integrity(self.pages)
        assert self.pool.available == UNITS - len(self._taken())
        held = {id(page): page for page in self.pages}.values()
        assert self.pool.held_pages() == [sum(page.segment == s for page in held) for s in range(len(LAYERS))]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_misuse_is_noticed():
    pool = PagePool(4, (1,))
    page = pool.allocate(0)
    pool.check_integrity([page])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    pool.release(page)
    with pytest.raises(ValueError, match="more often"):
        pool.release(page)
    with pytest.raises(ValueError, match="without a holder"):
        pool.publish(page, b"x")
    with pytest.raises(ValueError, match="blocks"):
        PagePool(0, (1,))
    pool._free.append(3)
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([])


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def test_segments_and_plans(model):
    recipe = recipe_for(model)
    segments = Segments.between(4, [recipe, recipe_for(model, (2,), (0.1,))])
    assert segments.bounds == (0, 1, 2, 3, 4) and segments.names() == ["0", "1", "2", "3"]
    assert Segments.between(4, [recipe_for(model, (2,), (0.1,))]).names() == ["0-1", "2-3"]
    before = recipe_for(model, (0, 2), (0.5, 0.25), method="custom", selections=[{"score": "none", "policy": "maxmin"}])
    assert Segments.between(4, [before]).names() == ["0-1", "2-3"]

    def plan(recipe, *pictures):
        numbers = [-1, *(number for number, tokens in enumerate(pictures) for _ in range(tokens)), -1]
        index = torch.tensor([numbers])
        found = plan_prompt(recipe, segments, ImageIndex(index, index))
        return found.keep, found.dropped

    assert plan(recipe, 16) == ({1: (12,), 2: (8,), 3: (4,)}, (0, 4, 8, 12))
    assert plan(recipe, 16, 16) == ({1: (24,), 2: (16,), 3: (8,)}, (0, 8, 16, 24))
    assert plan(recipe) == plan(None, 16) == ({}, (0, 0, 0, 0))
    assert plan(recipe_for(model, (2,), (0.1,)), 16) == ({2: (2,)}, (0, 0, 14, 14))
    own = recipe_for(model, (1, 2), (0.5, 0.25), reference="per_image")
    assert plan(own, 4, 12) == ({1: (2, 6), 2: (1, 3)}, (0, 8, 12, 12))
    assert plan(before, 16) == ({0: (8,), 2: (4,)}, (8, 8, 12, 12))
    with pytest.raises(UsageError, match="layer 2"):
        Segments.between(4, []).check(recipe_for(model, (2,), (0.1,)))


def test_budgets_share_the_drop_alike(model):
    recipe = recipe_for(model, keep=(0.8, 0.7, 0.5))
    assert at_budget(recipe, 0.5) == recipe
    tighter = at_budget(recipe, 0.25)
    assert tighter.keep == (0.7, 0.55, 0.25) and tighter.final_keep == 0.25
    assert at_budget(recipe, 1.0).keep == (1.0, 1.0, 1.0)
    assert at_budget(recipe_for(model, keep=(1.0, 1.0, 1.0)), 0.25).keep == (0.75, 0.5, 0.25)
    profiled = recipe_for(model, keep=(0.8, 0.7, 0.5), sensitivities=[0.1, 0.2, 0.3])
    assert (
        at_budget(profiled, 0.4).final_keep == 0.4
        and at_budget(profiled, 0.4).keep[0] < at_budget(profiled, 0.6).keep[0]
    )
    for wrong in (0, 1.1, True, -1):
        with pytest.raises(RecipeError, match="keep"):
            at_budget(recipe, wrong)
