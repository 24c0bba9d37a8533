"""Between HTTP and the engine: settings, prompts, choices, and what every request is checked for."""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quota.core.errors import UsageError
from quota.core.malloc import return_freed_memory
from quota.core.recipe import Recipe
from quota.core.shares import Shares
from quota.models import model_fingerprint
from quota.runtime.engine import (
    AsyncEngine,
    Engine,
    EngineConfig,
    Output,
    Prompt,
    QueueFull,
    Request,
    SamplingParams,
    Usage,
)
from quota.runtime.engine.preview import preview
from quota.runtime.prompts import PromptBuilder
from quota.server.bodies import Bodies
from quota.server.config import Settings
from quota.server.errors import ApiError, as_api_error
from quota.server.images import Decoders
from quota.server.lane import Lane
from quota.server.metrics import Metrics
from quota.server.responses import DONE, Answer, Choice, failure
from quota.server.schemas import MAX_CHOICES, ChatRequest, CompletionRequest, Message

log = logging.getLogger("quota.server")
NO_RECIPE = "none"
_TOKEN_CHARACTERS, _MAX_CHARACTERS = 32, 1 << 20  # most characters of a prompt, per token of the limit and at all
_MAX_ENTRIES = 1 << 17  # log-probabilities of one answer, alternatives included
_MAX_TOKENS = 1 << 16  # of the prompts of all choices of a request, and no less than MAX_CHOICES of the longest
_FEW_ENTRIES = 64  # which are written faster than a thread is asked


@dataclass(frozen=True)
class EngineRequest:
    """A request the engine can run: one engine request per choice."""

    id: str
    chat: bool
    requests: tuple[Request, ...]
    logprobs: bool
    stream: bool
    with_usage: bool


class Service:
    """One model, its engine and its counters."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.settings, self.name = settings, settings.name
        recipes = load_recipes(settings)
        shared = {field.name for field in fields(EngineConfig)} & Settings.model_fields.keys()
        config = EngineConfig(**{name: getattr(settings, name) for name in shared})
        # the engine decodes on its own thread, and tokenizers are not thread-safe
        tokenizer = copy.deepcopy(model.processor.tokenizer) if model.processor is not None else None
        engine = Engine(model, tokenizer=tokenizer, recipes=recipes, default=next(iter(recipes), None), config=config)
        self.prompts = PromptBuilder(model.processor, engine.model)
        self._large_prompts = PromptBuilder(
            copy.deepcopy(model.processor), engine.model
        )  # large images take seconds and block no small one
        self.metrics = Metrics()
        self.metrics.observe(engine)
        self.recipes = sorted(recipes)
        self.limit = engine.max_model_tokens
        self.engine = AsyncEngine(engine, self.metrics.observe)
        self.fingerprint = model_fingerprint(model)[:19]
        self.created = int(time.time())
        self.draining = False
        self._preparing = Shares(2 * settings.max_waiting)
        self._prepared = Shares(settings.prepared_bytes)
        self.metrics.prepared.set_function(lambda: self._prepared.total)
        self._lane, self._large_lane = Lane("quota-prepare"), Lane("quota-prepare-large")
        self.bodies = Bodies(settings, self._lane)
        self.decoders = Decoders(settings, lambda reason: self.metrics.decoders_lost.labels(reason).inc())

    def card(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "quota",
            "max_model_len": self.limit,
            "recipes": self.recipes,
        }

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def check_open(self, client: str) -> None:
        """Refuse early: before a body is read, when the server stops or as much of this client as it may hold is being
        prepared already."""
        if self.draining or not self.engine.healthy:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if not self._preparing.fits(client, 1):
            raise QueueFull(f"queue: {self._preparing.total} requests are being prepared already")

    @contextmanager
    def _place(self, client: str) -> Iterator[None]:
        """State of a request that is being prepared."""
        if not self._preparing.take(client, 1):
            raise QueueFull(f"queue: {self._preparing.total} requests are being prepared already")
        try:
            yield
        finally:
            self._preparing.give_back(client, 1)

    async def preview(self, body: ChatRequest, client: str) -> dict[str, Any]:
        """What the chat would take, without running it."""
        (request, *_) = (await self.chat(body, client)).requests
        engine = self.engine.engine
        found = await self._lane.run(client, len(request.prompt.ids), preview, engine.model, engine.recipes, request)
        recipe = found.recipe
        return {
            "object": "quota.preview",
            "model": self.name,
            "recipe": None if recipe is None else {"method": recipe.method, "final_keep": recipe.final_keep},
            "prompt_tokens": found.prompt_tokens,
            "images": [
                {"visual_tokens": tokens, "grid": grid, "tiles": tiles}
                for tokens, grid, tiles in zip(found.images, found.grids, found.tiles, strict=True)
            ],
            "visual_tokens_by_layer": list(found.visual_by_layer) if found.images else [],
            "kv_bytes": {"kept": found.kv_bytes, "unpruned": found.unpruned_kv_bytes},
        }

    async def chat(self, body: ChatRequest, client: str) -> EngineRequest:
        """Decode images, render and tokenize, off the event loop."""
        self.check_model(body.model)
        urls = [url for message in body.messages for url in message.images]
        if len(urls) > self.settings.max_images:
            raise ApiError(
                400,
                f"messages: {len(urls)} images, the limit is {self.settings.max_images}",
                code="too_many_images",
                param="messages",
            )
        characters = sum(len(text) for message in body.messages for text in message.texts)
        self._check_length("messages", characters)
        with self._place(client):
            await self._compile(body.schema_text, client)
            async with self.decoders.opened(urls, client) as (images, large):
                size = characters + sum(image.width * image.height for image in images)
                prompt = await (self._large_lane if large else self._lane).run(
                    client, size, self._chat_prompt, body.messages, images, large
                )
        spoken = self._spoken("chatcmpl", [prompt], body, client, chat=True)
        self._count_images(prompt, client)
        return spoken

    async def _compile(self, schema: str | None, client: str) -> None:
        """Here, so that the engine's thread finds it ready."""
        if schema is not None:
            try:
                await self._lane.run(client, len(schema), self.engine.engine.grammars.matcher, schema)
            except UsageError as error:
                raise ApiError(400, f"response_format: {error}", param="response_format") from error

    def _count_images(self, prompt: Prompt, client: str) -> None:
        """Prepared images have a budget, of which a client takes no more than is left for others; they count as long as
        anything refers to them."""
        nbytes, most = sum(image.pixels.nbytes for image in prompt.images), self.settings.prepared_bytes // 2
        if nbytes > most:
            message = f"messages: the images take {nbytes} bytes as the model sees them, at most {most} fit"
            raise ApiError(400, message, code="image_too_large", param="messages")
        if nbytes and not self._prepared.take(client, nbytes):
            message = (
                f"the prepared images of requests that are not answered yet take {self._prepared.total} of"
                f" {self._prepared.limit} bytes, {nbytes} more do not fit this client's share; try again later"
            )
            raise ApiError(429, message, code="too_many_bytes")
        for image in prompt.images:
            weakref.finalize(image, self._prepared.give_back, client, image.pixels.nbytes).atexit = False

    def _chat_prompt(self, messages: list[Message], images: list[Any], large: bool) -> Prompt:
        try:
            return (self._large_prompts if large else self.prompts).chat([message.turn for message in messages], images)
        finally:
            images.clear()  # the event loop holds the list
            if large:
                return_freed_memory()

    async def complete(self, body: CompletionRequest, client: str) -> EngineRequest:
        """Tokenize, off the event loop."""
        self.check_model(body.model)
        given = body.prompts()
        if not 0 < len(given) <= self.settings.max_running:
            raise ApiError(
                400, f"prompt: expected 1 to {self.settings.max_running} prompts, got {len(given)}", param="prompt"
            )
        for prompt in given:
            self._check_length("prompt", len(prompt) if isinstance(prompt, str) else 0)
        with self._place(client):
            prompts = [await self._lane.run(client, len(prompt), self.prompts.text, prompt) for prompt in given]
        return self._spoken("cmpl", prompts, body, client, chat=False)

    def _check_length(self, where: str, characters: int) -> None:
        """Refuse before tokenizing what cannot fit: a tokenizer takes about a second for a million characters, and
        others wait."""
        most = min(_MAX_CHARACTERS, _TOKEN_CHARACTERS * self.limit)
        if characters > most:
            message = f"{where}: {characters} characters; a model of {self.limit} tokens takes at most {most}"
            raise ApiError(400, message, code="context_length_exceeded", param=where)

    def _spoken(
        self, kind: str, prompts: list[Prompt], body: ChatRequest | CompletionRequest, client: str, *, chat: bool
    ) -> EngineRequest:
        id = f"{kind}-{uuid.uuid4().hex}"
        recipe = "default" if body.recipe is None else None if body.recipe == NO_RECIPE else body.recipe
        for prompt in prompts:
            if len(prompt.ids) >= self.limit:
                where = "messages" if chat else "prompt"
                raise ApiError(
                    400,
                    f"this model's limit is {self.limit} tokens, the prompt has {len(prompt.ids)}",
                    code="context_length_exceeded",
                    param=where,
                )
        samplings: list[SamplingParams] = body.samplings()
        self._check_choices(prompts, len(samplings), "messages" if chat else "prompt")
        self._check_reports(len(prompts) * len(samplings), samplings[0])
        requests = [
            Request(f"{id}-{i}", prompt, sampling, recipe, body.keep, body.keep_tokens, body.return_kept, client)
            for i, (prompt, sampling) in enumerate(itertools.product(prompts, samplings))
        ]
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EngineRequest(id, chat, tuple(requests), samplings[0].logprobs is not None, body.stream, with_usage)

    def _check_choices(self, prompts: Sequence[Prompt], n: int, where: str) -> None:
        """Bound what the engine's thread accepts at once, between two steps of the others: some milliseconds per choice
        and thousand tokens."""
        answers = max(self.settings.max_running, MAX_CHOICES)
        if len(prompts) * n > answers:
            raise ApiError(
                400,
                f"n: {len(prompts)} prompts with {n} choices each, at most {answers} answers are taken at once",
                param="n",
            )
        tokens, most = n * sum(len(prompt.ids) for prompt in prompts), max(_MAX_TOKENS, MAX_CHOICES * self.limit)
        if tokens > most:
            raise ApiError(
                400,
                f"{where}: the prompts of all choices have {tokens} tokens, at most {most} are taken at once",
                param=where,
            )

    def _check_reports(self, choices: int, sampling: SamplingParams) -> None:
        """Bound what log-probabilities one answer collects: each takes some hundred bytes, and time to write."""
        if sampling.logprobs is not None:
            entries = choices * min(sampling.max_tokens, self.limit) * (1 + sampling.logprobs)
            if entries > _MAX_ENTRIES:
                message = (
                    f"logprobs: {entries} of them, the limit is {_MAX_ENTRIES}; ask for fewer choices, tokens or"
                    " alternatives"
                )
                raise ApiError(400, message, param="logprobs")

    async def outputs(self, spoken: EngineRequest) -> AsyncGenerator[tuple[int, Output]]:
        """(choice, output) of all choices as they come. An error of one ends all."""
        numbers = {request.id: index for index, request in enumerate(spoken.requests)}
        async with aclosing(self.engine.stream(*spoken.requests)) as stream:
            async for output in stream:
                if output.reason in ("error", "abort"):
                    raise ApiError(500, "the request failed inside the server", code="internal_error")
                if output.usage is not None:
                    self.metrics.observe_usage(output.usage)
                yield numbers[output.id], output

    async def collect(self, spoken: EngineRequest) -> list[Choice]:
        """All choices, complete."""
        choices = [Choice(index) for index in range(len(spoken.requests))]
        async with aclosing(self.outputs(spoken)) as outputs:
            async for index, output in outputs:
                choices[index].add(output)
        return choices

    async def whole(self, spoken: EngineRequest, answer: Answer) -> bytes:
        """The body of an answer that is not streamed, written off the event loop."""
        choices = await self.collect(spoken)
        entries = sum(len(choice.logprobs) for choice in choices)
        return answer.whole(choices) if entries < _FEW_ENTRIES else await asyncio.to_thread(answer.whole, choices)

    async def events(self, spoken: EngineRequest, answer: Answer) -> AsyncGenerator[str]:
        """Server-sent events. The first is given out only when the engine has answered, so that refusals can still be
        plain responses."""
        usages: list[Usage] = []
        offsets = [0] * len(spoken.requests)
        opened = False
        try:
            async with aclosing(self.outputs(spoken)) as outputs:
                async for index, output in outputs:
                    event = answer.delta(index, output, offsets[index])
                    if not opened:
                        event = "".join(answer.opening(i) for i in range(len(offsets))) + event
                        opened = True
                    offsets[index] += sum(len(entry.text) for entry in output.logprobs)
                    usages += [output.usage] if output.usage is not None else []
                    if event:
                        yield event
        except Exception as error:
            if not opened:
                raise
            yield failure(as_api_error(error).body)
            return
        if spoken.with_usage:
            yield answer.closing(usages)
        yield DONE

    async def close(self) -> None:
        """End the decoding processes and the engine at once."""
        self.decoders.close()
        await self.engine.close()

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones, at most `drain_s`."""
        self.draining = True
        until = time.monotonic() + self.settings.drain_s
        while (self.engine.active or self._preparing.total) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        log.info("drained", extra={"unfinished": self.engine.active})


def load_recipes(settings: Settings) -> dict[str, Recipe]:
    """name=path entries; a bare path is named after its file."""
    recipes: dict[str, Recipe] = {}
    for entry in settings.recipes:
        name, sep, path = entry.partition("=")
        name, path = (name, path) if sep else (Path(entry).stem, entry)
        if not name or name in recipes or name in (NO_RECIPE, "default"):
            raise UsageError(f"recipes: expected name=path with a name of its own, got {entry!r}")
        recipes[name] = Recipe.load(path)
    return recipes


def with_model(settings: Settings) -> Service:
    """Load the checkpoint and build everything; CheckpointError, RecipeError and UsageError say what is wrong."""
    import torch

    from quota.runtime.load import load

    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = load(settings.checkpoint, dtype=getattr(torch, settings.dtype), device=settings.device)
    service = Service(model, settings)
    service.engine.engine.grammars.prepare()
    return service
