"""The state of one request inside the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.core.recipe import Recipe
from quota.models.images import ImageIndex, ImageTokens
from quota.prune.select import needs_images
from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.pool import Page, PagePool
from quota.runtime.engine.positions import Positions
from quota.runtime.engine.prefix import Content, PageNames, content_of, digest
from quota.runtime.engine.reply import Reply
from quota.runtime.engine.request import Request, Usage
from quota.runtime.engine.segments import Segments, plan_prompt
from quota.runtime.engine.selection import Attended, Choice


class Sequence:
    """What the model sees of one request: tokens, plan, pages and progress. `tokens` is the prompt and the answer so
    far; keys and values of the first `computed` of them are in the pool. reply: what the client sees. visual, shown
    bool [prompt tokens]: the visual tokens, and every token that holds an image's features."""

    def __init__(
        self,
        request: Request,
        order: int,
        recipe: Recipe | None,
        model: EngineModel,
        segments: Segments,
        reply: Reply,
    ) -> None:
        self.request, self.order, self.recipe, self.segments, self.reply = request, order, recipe, segments, reply
        self.client = request.client
        self.tokens = [int(token) for token in request.prompt.ids]
        self.prompt_tokens = len(self.tokens)
        self.prefix = self.prompt_tokens if model.family.prefix else 0  # tokens that see each other
        _check_tokens(self.tokens, model.vocabulary)
        ids = torch.tensor(self.tokens, dtype=torch.int64)
        sizes = [
            model.image_tokens(image) for image in request.prompt.images
        ]  # refuses what is no image, so it comes first
        index = model.image_index(request.prompt)
        self.visual, self.shown = index.visual[0].numpy(), (index.image[0] >= 0).numpy()
        self.images = [
            (model.image_digest(image), size) for image, size in zip(request.prompt.images, sizes, strict=True)
        ]
        self.features: list[Tensor | None] = [None] * len(self.images)
        self.selecting = (
            self.prompt_tokens if request.prompt.selection_tokens is None else request.prompt.selection_tokens
        )
        self._check(index)
        self.plan = plan_prompt(recipe, segments, index)
        shown = (
            [raster for image in request.prompt.images for raster in model.image_shown(image)]
            if recipe is not None and needs_images(recipe)
            else None
        )
        self.raster = ImageTokens.of(index.tile, shown)
        self.positions = Positions(model.positions(ids, request.prompt.images), self.plan.dropped, recipe, model.biased)
        shown_at = self.shown.nonzero()[0]
        self.first_shown, self.last_shown = (
            (int(shown_at[0]), int(shown_at[-1])) if len(shown_at) else (self.prompt_tokens, -1)
        )
        self.names: list[PageNames] = []
        self.pages: list[list[Page]] = [[] for _ in segments.spans]
        self.tables = [np.zeros((len(span), 0), dtype=np.int32) for span in segments.spans]
        self.shared = [0] * len(segments)
        self.published = [0] * len(segments)
        self.computed = self.cached = 0
        self.ahead: list[Chunk] = []  # rows that wait before the first layer that drops
        self.preemptions = self.passed_by = self.admitted_tokens = 0
        self.paused = False
        self.kept: dict[int, np.ndarray] = {}  # layer -> prompt tokens alive from there on
        self.siblings: list[Sequence] = []  # requests of the same prompt, which wait for its pages

    def _check(self, index: ImageIndex) -> None:
        images, found = [tokens for _, tokens in self.images], index.image[index.image >= 0].bincount().tolist()
        if images != found:
            raise UsageError(
                f"prompt: expected image tokens for {len(images)} images of {images or 'no'} visual tokens, got"
                f" {found or 'none'}"
            )
        if not 0 < self.selecting <= self.prompt_tokens or self.shown[self.selecting :].any():
            raise UsageError(
                f"selection_tokens: expected a part of the prompt that holds every image, got {self.selecting} of"
                f" {self.prompt_tokens}"
            )
        if self.selecting < self.prefix:
            raise UsageError(
                f"selection_tokens: expected all {self.prompt_tokens} of a prompt whose tokens see each other, got"
                f" {self.selecting}"
            )

    def name_pages(self, page_size: int) -> None:
        """Prepare the names under which pages can be shared."""
        content: Content = content_of(self.tokens[: self.prompt_tokens], self.shown, self.images)
        recipe = digest(self.recipe.dumps().encode()) if self.recipe is not None else b""
        for name, dropped in zip(self.segments.names(), self.plan.dropped, strict=True):
            chosen = (self.first_shown, dropped, self.selecting, recipe) if dropped else None
            if self.prefix:  # every token is a function of all of them, and of what was dropped
                name += digest(content.tobytes() + repr(chosen).encode()).hex()
            self.names.append(PageNames(name, page_size, content, chosen))

    # counting

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def decoding(self) -> bool:
        """Only the newest token is missing from the pool."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_tokens

    @property
    def gained(self) -> int:
        """Tokens of the answer since it was admitted."""
        return len(self.tokens) - self.admitted_tokens

    def slots(self, segment: int, tokens: int) -> int:
        """Slots that the first `tokens` tokens take in a segment; tokens is outside the images of a pruned prompt."""
        return tokens if tokens <= self.first_shown else tokens - self.plan.dropped[segment]

    def blocks(self, tokens: int, page_size: int) -> int:
        """Blocks of all segments for that many tokens."""
        return sum(-(-self.slots(s, tokens) // page_size) * len(span) for s, span in enumerate(self.segments.spans))

    def usage(self) -> Usage:
        visual = int(self.visual.sum())
        by_layer = tuple(
            visual - dropped for span, dropped in zip(self.segments.spans, self.plan.dropped, strict=True) for _ in span
        )
        return Usage(
            self.prompt_tokens,
            len(self.answer),
            visual,
            by_layer,
            self.cached,
            self.selecting,
            self.preemptions,
            self._kept_visual() if self.request.return_kept else None,
        )

    def _kept_visual(self) -> dict[int, tuple[int, ...]]:
        number = self.visual.cumsum() - 1  # of a visual token, over all images
        visual = {layer: tokens[self.visual[tokens]] for layer, tokens in self.kept.items()}
        return {layer: tuple(number[tokens].tolist()) for layer, tokens in visual.items()}

    # pages

    def hold(self, segment: int, page: Page) -> None:
        """Append a page to the block table of a segment."""
        self.pages[segment].append(page)
        if page.positions is not None:
            self.positions.extend(segment, page.positions)
        self.tables[segment] = np.concatenate(
            [self.tables[segment], np.array(page.blocks, dtype=np.int32)[:, None]], axis=1
        )

    def replace(self, segment: int, at: int, page: Page) -> Page:
        """Put a page with the same content in the place of another, which is returned."""
        old, self.pages[segment][at] = self.pages[segment][at], page
        table = self.tables[segment].copy()  # a step may still read the old one
        table[:, at] = page.blocks
        self.tables[segment] = table
        return old

    def fork_from(self, parent: Sequence) -> None:
        """Take over the progress of a request of the same prompt, whose pages are held already."""
        self.computed = self.cached = parent.computed
        self.shared, self.published = [0] * len(self.segments), list(parent.published)
        self.positions, self.kept = parent.positions.fork(), dict(parent.kept)
        self.features = [None] * len(self.features)

    def release(self, pool: PagePool) -> None:
        """Give every page back and forget all progress; the tokens stay."""
        for segment, pages in enumerate(self.pages):
            for page in reversed(pages):  # the end of a chain is evicted before its beginning
                pool.release(page)
            self.pages[segment] = []
            self.tables[segment] = self.tables[segment][:, :0]
            self.shared[segment] = self.published[segment] = 0
        self.computed, self.ahead = 0, []
        self.positions.forget()

    def publish(self, pool: PagePool, page_size: int) -> None:
        """Offer the pages that are full and computed to others."""
        for segment, names in enumerate(self.names):
            full = self.slots(segment, self.computed) // page_size
            for page in range(self.published[segment], full):
                self.pages[segment][page].positions = self.positions.copied(
                    segment, page * page_size, (page + 1) * page_size
                )
                pool.publish(self.pages[segment][page], names[page])
                self.published[segment] = full

    def append(self, token: int) -> None:
        """A new token of the answer."""
        self.tokens.append(token)
        for names in self.names:
            names.append(token)

    # work

    def reusable(self, matched: list[int]) -> int:
        """Tokens that need not be computed when the first matched[s] slots of each segment are there; the last token
        always is."""
        most = len(self.tokens) - 1
        if not self.plan.keep:
            return min(*matched, most)
        past = min(most, *(slots + dropped for slots, dropped in zip(matched, self.plan.dropped, strict=True)))
        return past if past > self.last_shown else min(self.first_shown, most, *matched)

    @property
    def chooses(self) -> bool:
        """Whether tokens are still to be chosen."""
        return bool(self.plan.keep) and self.computed <= self.first_shown

    def fill(self, chunk: Chunk, model: EngineModel) -> Chunk:
        """Say what the chunk is about; it begins at `computed`, or past it when rows go ahead to the first drop. A
        chunk that was run can be filled in again."""
        begin, end = chunk.begin, chunk.end
        chunk.x, chunk.choice, chunk.attended, chunk.kept = self._embedded(model, begin, end), None, None, {}
        if self.chooses and self.recipe is not None:
            group = torch.full((len(self.tokens),), -1)
            group[: self.prompt_tokens] = self.plan.group
            shown = torch.from_numpy(self.shown)
            chunk.choice = Choice.of_prompt(
                self.recipe, self.plan.keep, group, shown, self.raster, self.selecting, begin
            )
        if chunk.enter:
            chunk.x = torch.cat([part.hidden for part in self.ahead])
            parts = [part.attended for part in self.ahead if part.attended is not None]
            chunk.attended = Attended.joined(parts) if parts else None
        chunk.ids, chunk.rotary = self.tokens[begin:end], self.positions.of_tokens(begin, end)
        chunk.base = tuple(begin if self.chooses else self.slots(s, begin) for s in range(len(self.segments)))
        chunk.cached = tuple(self.positions.of_slots(s, 0, slots) for s, slots in enumerate(chunk.base))
        chunk.shared, chunk.tables, chunk.compact = tuple(self.shared), self.tables, self.positions.compact
        chunk.origin, chunk.prefix = self.positions.origin, self.prefix
        return chunk

    def advance(self, chunk: Chunk) -> None:
        """The tokens of a chunk have passed all layers."""
        begin, end = chunk.begin, chunk.end
        for layer, rows in chunk.kept.items():
            self.kept[layer] = rows.numpy() + begin
        alive = np.arange(begin, end)
        for segment, span in enumerate(self.segments.spans):
            if span[0] in chunk.kept:
                alive = self.kept[span[0]]
            self.positions.put(segment, self.slots(segment, begin), alive)
        self.computed, self.ahead = end, []

    def _embedded(self, model: EngineModel, begin: int, end: int) -> Tensor | None:
        """Hidden states of tokens begin .. end where images stand among them; None where the ids say all."""
        inside = self.shown[begin : min(end, self.prompt_tokens)]
        if not inside.any():
            return None
        x = model.with_planes(model.embed(torch.tensor(self.tokens[begin:end])))
        seen = int(self.shown[:begin].sum())
        features: Any = torch.cat([part for part in self.features if part is not None])
        x[: len(inside)][torch.from_numpy(inside).to(x.device)] = features[seen : seen + int(inside.sum())]
        return x


def _check_tokens(tokens: list[int], vocabulary: int) -> None:
    if not tokens:
        raise UsageError("prompt: expected at least one token, got none")
    if not all(0 <= token < vocabulary for token in tokens):
        raise UsageError(f"prompt: expected token ids from 0 to {vocabulary - 1}")
