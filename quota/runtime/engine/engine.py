"""The engine: requests in, tokens out, step by step. Not thread-safe; `AsyncEngine` gives it a thread of its own."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quota.core.errors import QuotaError, UsageError
from quota.core.recipe import Recipe
from quota.core.shares import fits
from quota.models import model_fingerprint
from quota.prune.budget import tile_sizes
from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.decode import Decoder, chosen, cuda_graphs
from quota.runtime.engine.features import Features
from quota.runtime.engine.grammar import Grammars
from quota.runtime.engine.kv_storage import KvStorage
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.pool import PagePool
from quota.runtime.engine.recipes import Recipes
from quota.runtime.engine.reply import Reply
from quota.runtime.engine.request import FinishReason, Output, Request, TokenLogprob
from quota.runtime.engine.runner import Runner
from quota.runtime.engine.sampling import Row, Sampler
from quota.runtime.engine.scheduler import Scheduler
from quota.runtime.engine.segments import Segments
from quota.runtime.engine.sequence import Sequence
from quota.runtime.engine.stats import Stats
from quota.runtime.engine.turns import Pace

log = logging.getLogger(__name__)


class QueueFull(QuotaError):
    """As many requests of this client wait as the engine accepts."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. kv_bytes: memory of the key/value pool. page_tokens: P; small pages waste less and share
    more. max_running: most requests in a step's decoding, and of one client that hold pages. max_waiting: most requests
    of a client in the queue; several share twice as many places. step_tokens: most prefill rows per step, the bound on
    how long a decoding request waits for others. step_s: how long a step should take; a slow machine gives out fewer
    rows per step. max_model_tokens: longest prompt plus answer, None for the model's own limit. feature_bytes: memory
    for encoded images, so that an image asked about again is not encoded again. graphs: whether decode steps on a GPU
    are captured and replayed as CUDA graphs.
    """

    kv_bytes: int = 256 << 20
    page_tokens: int = 16
    max_running: int = 64
    max_waiting: int = 256
    step_tokens: int = 512
    step_s: float = math.inf
    max_model_tokens: int | None = None
    feature_bytes: int = 256 << 20
    prefix_cache: bool = True
    graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_bytes", "page_tokens", "max_running", "max_waiting", "step_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.step_s > 0:
            raise UsageError(f"step_s: expected a time above 0, got {self.step_s}")


class Engine:
    """Continuous batching over one model.

    model: from `quota.load`, without a recipe installed. recipes: name -> Recipe; all their prune points become segment
    boundaries. default: the name of the recipe for requests that ask for none in particular; None prunes nothing.
    tokenizer: for texts and stop texts; None reports ids.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        recipes: Mapping[str, Recipe] | None = None,
        default: str | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.model = EngineModel(model)
        chosen(self.model.device, self.model.scheme)
        self.tokenizer = tokenizer
        self.recipes = Recipes(recipes, default)
        identity = model_fingerprint(model)
        for recipe in self.recipes.named.values():
            recipe.check_model(identity, self.model.layers, self.model.family.model_class)
        self.segments = Segments.between(self.model.layers, self.recipes.named.values())
        page_size = self.config.page_tokens
        blocks = self.config.kv_bytes // self.model.block_bytes(page_size)
        if blocks < self.model.layers:
            raise UsageError(
                f"kv_bytes: {self.config.kv_bytes} hold no page of {page_size} tokens in {self.model.layers} layers;"
                " give the pool more"
            )
        self.storage = KvStorage(
            blocks, page_size, self.model.kv_heads, self.model.head_dim, self.model.kv, self.model.device
        )
        self.pool = PagePool(blocks, [len(span) for span in self.segments.spans])
        capture = cuda_graphs(self.model.device) if self.config.graphs and self.model.device.type == "cuda" else None
        self.runner = Runner(
            self.model, self.storage, self.segments, Decoder(self.model, self.storage, self.segments, capture)
        )
        self.scheduler = Scheduler(self.pool, self.storage, self.segments, self.config.max_running)
        self.pace = Pace(self.config.step_tokens, self.config.step_s)
        self.max_model_tokens = min(self.model.max_tokens, self.config.max_model_tokens or self.model.max_tokens)
        self.stats = Stats(self.segments.names())
        self.eos = _eos_tokens(model)
        self.grammars = Grammars(tokenizer, self.model.vocabulary, self.eos)
        self.features = Features(self.model, self.config.feature_bytes)
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[Output] = []
        self._order = 0

    # requests

    def submit(self, request: Request) -> Sequence:
        """Accept a request, or say why not: UsageError (impossible or inconsistent), QueueFull."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Sequence]:
        """Accept all of these requests or none. Those of one `Prompt` object, recipe and budget compute it once:
        the first does, the others go on from its pages. An empty queue takes a group of any size.
        """
        requests, ids = list(requests), set(self._sequences)
        for request in requests:
            if request.id in ids:
                raise UsageError(f"id: {request.id!r} is in use")
            ids.add(request.id)
        self._check_queue(requests)
        sequences = [self._sequence(request, self._order + number) for number, request in enumerate(requests)]
        parents: list[Sequence] = []
        for sequence in sequences:
            parent = next(
                (s for s in parents if s.request.prompt is sequence.request.prompt and s.recipe == sequence.recipe),
                None,
            )
            if parent is not None:
                parent.siblings.append(sequence)
            else:
                parents.append(sequence)
                self.scheduler.queue(sequence)
            self._sequences[sequence.request.id] = sequence
        self._order += len(sequences)
        self.stats.accepted += len(sequences)
        return sequences

    def _check_queue(self, requests: list[Request]) -> None:
        waiting = Counter(sequence.client for sequence in self.scheduler.waiting)
        waiting.update(sibling.client for sequence in self._sequences.values() for sibling in sequence.siblings)
        for client, amount in Counter(request.client for request in requests).items():
            places = 2 * self.config.max_waiting  # so that a client alone has max_waiting
            if waiting and not fits(places, waiting.total(), waiting[client], amount):
                raise QueueFull(
                    f"queue: {waiting[client]} requests of this client wait already, {waiting.total()} in all"
                )
            waiting[client] += amount

    def _sequence(self, request: Request, order: int) -> Sequence:
        ids, capped = request.prompt.ids, request.keep_tokens is not None
        recipe = self.recipes.of(request, tile_sizes(self.model.image_index(request.prompt))[0] if capped else ())
        if recipe is not None:
            self.segments.check(recipe)
        sampler = Sampler(request.sampling, ids, self.model.vocabulary, self.grammars)
        sequence = Sequence(request, order, recipe, self.model, self.segments, Reply(sampler, self.tokenizer))
        self._check_size(sequence)
        if self.config.prefix_cache and not request.return_kept:
            sequence.name_pages(self.config.page_tokens)
        return sequence

    def _check_size(self, sequence: Sequence) -> None:
        if sequence.prompt_tokens >= self.max_model_tokens:
            raise UsageError(
                f"prompt: {sequence.prompt_tokens} tokens leave no room for an answer; the limit is"
                f" {self.max_model_tokens} together"
            )
        longest = min(self.max_model_tokens, sequence.prompt_tokens + sequence.request.sampling.max_tokens)
        need = sequence.blocks(longest, self.config.page_tokens)
        if need > self.pool.blocks:
            raise UsageError(
                f"prompt: {longest} tokens need {need} blocks of the key/value pool, which has {self.pool.blocks}; ask"
                " for less or give it more"
            )

    def abort(self, id: str) -> None:
        """Stop a request; its last output has the reason "abort". Unknown ids are ignored: it may just have ended."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._finish(sequence, "abort")

    def pause(self, ids: Iterable[str]) -> None:
        """Compute nothing for these requests until `resume`; they hold no pages meanwhile. Unknown ids are ignored."""
        for sequence in filter(None, map(self._sequences.get, ids)):
            self.scheduler.pause(sequence)

    def resume(self, ids: Iterable[str]) -> None:
        """Go on with these requests."""
        for sequence in filter(None, map(self._sequences.get, ids)):
            sequence.paused = False

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._outputs) or self.scheduler.busy

    # one step

    @torch.no_grad()
    def step(self) -> list[Output]:
        """Advance every request that can; returns what each gained."""
        began, rows = time.monotonic(), self.pace.rows
        self.scheduler.admit(rows)
        chunks = self.scheduler.decodes(min(rows, self.config.max_running))
        encoded = self._encode_images(rows)
        chunks += self.scheduler.prefills(rows)
        for chunk in chunks:
            if chunk.sequence.reply.times.admitted is None:
                chunk.sequence.reply.times.admitted = began
        for chunk, logits in self._run(chunks):
            self._guarded(chunk.sequence, self._commit, chunk, logits)
        seconds = time.monotonic() - began
        self.pace.observe(max(encoded, sum(chunk.end - chunk.begin for chunk in chunks)), seconds)
        self.stats.observe_step(chunks, seconds)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _encode_images(self, tokens: int) -> int:
        """Encode about `tokens` visual tokens of images that are not known yet, so that decoding goes on meanwhile;
        how many."""
        for sequence in self.scheduler.prefilling():
            for number, (name, _) in enumerate(sequence.images):
                if sequence.features[number] is None:
                    sequence.features[number] = self.features.get(name)
        wanted: dict[bytes, list[tuple[Sequence, int]]] = {}
        for sequence, number in self.scheduler.images(tokens):
            wanted.setdefault(sequence.images[number][0], []).append((sequence, number))
        firsts = {name: holders[0] for name, holders in wanted.items()}
        images = {name: sequence.request.prompt.images[number] for name, (sequence, number) in firsts.items()}
        for name, found in self.features.encode(images).items():
            for sequence, number in wanted[name]:
                if isinstance(found, Exception):
                    self._fail(sequence, found)
                else:
                    sequence.features[number] = found
        return sum(sequence.images[number][1] for sequence, number in firsts.values())

    def _run(self, chunks: list[Chunk]) -> list[tuple[Chunk, Row | None]]:
        """Run all chunks in one batch; after an exception each alone, so that only the request that causes it fails."""
        try:
            return self._together(chunks)
        except Exception:
            log.exception("a step of %d requests failed; running them one by one", len(chunks))
        done = []
        for chunk in chunks:
            try:
                done += self._together([chunk])
            except Exception as error:
                self._fail(chunk.sequence, error)
        return done

    def _together(self, chunks: list[Chunk]) -> list[tuple[Chunk, Row | None]]:
        filled = [chunk.sequence.fill(chunk, self.model) for chunk in chunks]
        return list(zip(chunks, self.runner.run(filled), strict=True)) if chunks else []

    def _guarded(self, sequence: Sequence, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        log.error("request %s failed", sequence.request.id, exc_info=error)
        self.stats.failed += 1
        self._finish(sequence, "error", error=f"{type(error).__name__}: {error}")

    def _commit(self, chunk: Chunk, logits: Row | None) -> None:
        sequence = chunk.sequence
        if logits is None:
            sequence.ahead.append(chunk)
            return
        sequence.advance(chunk)
        sequence.publish(self.pool, self.config.page_tokens)
        if chunk.end == len(sequence.tokens):
            sequence.features = [None] * len(sequence.features)
            while sequence.siblings:
                sibling = sequence.siblings.pop(0)
                if self.scheduler.fork(sequence, sibling):
                    self._guarded(sibling, self._choose, sibling, logits)
                else:
                    self.scheduler.queue(sibling)
            self._choose(sequence, logits)

    def _choose(self, sequence: Sequence, logits: Row) -> None:
        """The next token of a request from its logits."""
        reply, sampling, place = sequence.reply, sequence.request.sampling, len(sequence.answer)
        token = reply.choose(logits, place)
        ends = token in self.eos and not sampling.ignore_eos
        last = ends or place + 1 >= sampling.max_tokens or len(sequence.tokens) + 1 >= self.max_model_tokens
        sequence.append(token)
        self.stats.observe_token(reply.times)
        text, report = reply.push(logits, token, last)
        if last or reply.stopped:
            self._finish(sequence, "stop" if ends or reply.stopped else "length", text, (token,), report)
        else:
            self._outputs.append(Output(sequence.request.id, text, (token,), report))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        tokens: tuple[int, ...] = (),
        report: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> None:
        if self._sequences.pop(sequence.request.id, None) is None:
            return
        self.scheduler.remove(sequence)
        for parent in self._sequences.values():
            if sequence in parent.siblings:
                parent.siblings.remove(sequence)
        if sequence.siblings:  # the next one computes the prompt for the others
            successor = sequence.siblings[0]
            successor.siblings, sequence.siblings = sequence.siblings[1:], []
            self.scheduler.queue(successor)
        self.stats.finished[reason] += 1
        self._outputs.append(Output(sequence.request.id, text, tokens, report, reason, sequence.usage(), error))

    # introspection

    def check_integrity(self) -> None:
        """AssertionError unless every block of the pool is accounted for."""
        holders = [
            page
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]
            for pages in sequence.pages
            for page in pages
        ]
        self.pool.check_integrity(holders)


def _eos_tokens(model: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
