"""The engine from Python: many prompts at once through one model, batched continuously.

    with quota.LLM("demo-out/quantized", recipe="demo-out/recipe.json") as llm:
        print(llm.generate(("where is the red star ?", "photo.png")).text)

Every answer has the bits it has alone (docs/numerics.md), whatever else is in the batch.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch

from quota.core.errors import QuotaError, UsageError
from quota.core.images import to_image
from quota.core.recipe import Recipe
from quota.runtime.engine import Engine, EngineConfig, Output, Prompt, Request, SamplingParams, TokenLogprob, Usage
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.preview import Preview, preview
from quota.runtime.engine.request import FinishReason
from quota.runtime.load import load
from quota.runtime.prompts import PromptBuilder, read_messages

RecipeLike: TypeAlias = Recipe | str | Path
Asked: TypeAlias = str | tuple[Any, ...] | Mapping[str, Any] | Prompt | list[Any]
"""What can be asked: see `LLM.generate`."""

NO_RECIPE = "none"
_POOL_TOKENS = 8192  # the pool holds a request of so many, or of the model's limit where that is less


@dataclass(frozen=True)
class Completion:
    """A finished answer. text: without special tokens. tokens: ids, an end token included. reason: "stop" (an end token
    or a stop text) or "length". usage: counts, with the visual tokens alive in each layer. logprobs: one entry per
    token where `SamplingParams.logprobs` asked for them."""

    text: str
    tokens: tuple[int, ...]
    reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class _Parts:
    """The outputs of one request so far."""

    outputs: list[Output] = field(default_factory=list)

    def whole(self, name: str) -> Completion:
        last = self.outputs[-1]
        if last.reason is None or last.usage is None or last.reason in ("error", "abort"):
            raise QuotaError(f"{name}the engine could not answer it ({last.error or last.reason}); see its log")
        return Completion(
            "".join(output.text for output in self.outputs),
            tuple(token for output in self.outputs for token in output.tokens),
            last.reason,
            last.usage,
            tuple(entry for output in self.outputs for entry in output.logprobs),
        )


def why_not(model: Any) -> str | None:
    """Why the engine cannot run a loaded model (it runs quantized language models), None where it can."""
    try:
        EngineModel(model)
    except UsageError as error:
        return str(error)
    return None


class LLM:
    """A model and its engine. A context manager; `close()` lets both go. Threads may share it.

    model: a quantized checkpoint folder, or a model from `quota.load` that has no recipe installed.
    recipe: what prunes where a call does not say: a Recipe, a file, or several by name ({"small": ..., "large": ...},
    the first is the default). None prunes nothing.
    dtype, device: as `quota.load` takes them, for a folder.
    engine: fields of `quota.runtime.engine.EngineConfig`, such as kv_bytes, max_running, step_tokens.

    CheckpointError, RecipeError and UsageError say what does not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        recipe: RecipeLike | Mapping[str, RecipeLike] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **engine: Any,
    ) -> None:
        named = recipe if isinstance(recipe, Mapping) else {} if recipe is None else {"default recipe": recipe}
        self.recipes = {name: _recipe(given) for name, given in named.items()}
        self._default = next(iter(self.recipes), None)
        known = [option.name for option in fields(EngineConfig)]
        if unknown := sorted(set(engine) - set(known)):
            raise UsageError(f"{unknown[0]}: expected one of {', '.join(known)}")
        if isinstance(model, (str, Path)):
            model = load(model, dtype=dtype, device=device)
        self.model = model
        runs = EngineModel(model)
        self.prompts = PromptBuilder(getattr(model, "processor", None), runs)
        self._config = EngineConfig(**{**_room(runs, engine), **engine})
        self._tokenizer = copy.deepcopy(model.processor.tokenizer)  # the builder's is used by other threads meanwhile
        self._engine: Engine | None = self._made([])
        self._lock = threading.RLock()
        self._calls = itertools.count()
        self._inboxes: dict[str, deque[Output]] = {}

    # asking

    def generate(
        self,
        prompts: Asked,
        sampling: SamplingParams | None = None,
        *,
        recipe: RecipeLike | None = "default",
        keep: float | None = None,
        keep_tokens: int | None = None,
    ) -> Any:
        """The answer to a prompt (Completion), or those to a list of prompts (list of them, in order).

        A prompt is a question, asked by the model's chat template with its images before the text: a text, a tuple
        (text, image) or (text, [images]), or {"prompt": text, "images": [images]}; or a conversation, a list of
        messages (see `chat`); or a `Prompt` of token ids. An image is a Pillow image, a path, the bytes of a file, a
        data URL or a uint8 array [H, W, 3].

        sampling: SamplingParams; greedy, at most 256 tokens, where None. recipe: a name of the LLM's, a Recipe or a
        file; None or "none" prunes nothing. keep: another final keep ratio for that recipe. keep_tokens: at most so
        many visual tokens of the largest image stay after the last drop.
        UsageError and ImageError name the prompt of a list that cannot be run; the others of its call end with it.
        """
        many = isinstance(prompts, list) and not _is_conversation(prompts)
        requests = self._requests(prompts, many, sampling, recipe, (keep, keep_tokens))
        made = list(self.run(requests, name=_numbered if many else _unnamed))
        return made if many else made[0]

    def chat(
        self,
        messages: Sequence[Any],
        sampling: SamplingParams | None = None,
        *,
        recipe: RecipeLike | None = "default",
        keep: float | None = None,
        keep_tokens: int | None = None,
    ) -> Any:
        """The next turn of a conversation, or of each in a list of them; as `generate`.

        messages: OpenAI's, {"role": "system", "user" or "assistant", "content": a text or a list of parts}, a part
        being {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": a data URL}} or
        {"type": "image", "image": any image}. Later turns keep the visual tokens of the first, and reuse its pages.
        """
        if not messages or not (_is_conversation(messages) or all(_is_conversation(one) for one in messages)):
            raise UsageError('messages: expected a list of {"role": ..., "content": ...}, or a list of such lists')
        given = [dict(message) if isinstance(message, Mapping) else list(message) for message in messages]
        return self.generate(given, sampling, recipe=recipe, keep=keep, keep_tokens=keep_tokens)

    def stream(
        self,
        prompts: Asked,
        sampling: SamplingParams | None = None,
        *,
        recipe: RecipeLike | None = "default",
        keep: float | None = None,
        keep_tokens: int | None = None,
    ) -> Iterator[Output]:
        """The answer to a prompt, or those to a list, piece by piece: `for output in llm.stream(...)`.

        `output.text` is what is new, `output.id` the number of the prompt ("0" where there is one); the last output of
        each prompt has a `reason` and the `usage`. Leaving the loop ends what still runs. Arguments as for `generate`.
        """
        many = isinstance(prompts, list) and not _is_conversation(prompts)
        requests = self._requests(prompts, many, sampling, recipe, (keep, keep_tokens))
        for number, output in self._outputs(requests, _numbered if many else _unnamed):
            yield replace(output, id=str(number))

    def run(self, requests: Iterable[Request], *, name: Callable[[int], str] | None = None) -> Iterator[Completion]:
        """Completions of engine requests, in order. Requests are taken from the iterable as there is room
        (`max_running` at a time), so it may be long and make its prompts when asked. Their ids are replaced; a Recipe
        in one may be any. name: number -> how errors begin."""
        name = name or _unnamed
        parts: dict[int, _Parts] = {}
        done: dict[int, Completion] = {}
        following = 0
        for number, output in self._outputs(requests, name):
            parts.setdefault(number, _Parts()).outputs.append(output)
            if output.reason is not None:
                done[number] = parts.pop(number).whole(name(number))
            while following in done:
                yield done.pop(following)
                following += 1

    def close(self) -> None:
        """Let the model and the engine go; what runs ends with a UsageError. Calling it twice is harmless."""
        with self._lock:
            self._engine = self.model = None
            self._inboxes.clear()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def preview(
        self,
        prompt: Asked,
        *,
        recipe: RecipeLike | None = "default",
        keep: float | None = None,
        keep_tokens: int | None = None,
    ) -> Preview:
        """What `generate` would take for one prompt: tokens, visual tokens alive in each layer, bytes of the cache.
        Nothing runs."""
        (request,) = self._requests(prompt, False, None, recipe, (keep, keep_tokens))
        return preview(self.engine.model, self.engine.recipes, request)

    # inside

    @property
    def engine(self) -> Engine:
        """The engine; UsageError after `close`."""
        if self._engine is None:
            raise UsageError("LLM: closed; make another one")
        return self._engine

    def _made(self, more: Sequence[Recipe]) -> Engine:
        """An engine whose segments end where these recipes prune, too."""
        self._bounds = {layer for recipe in (*self.recipes.values(), *more) for layer in recipe.candidates}
        extra = {f"#{number}": recipe for number, recipe in enumerate(more)}
        recipes = {**self.recipes, **extra}
        return Engine(
            self.model, tokenizer=self._tokenizer, recipes=recipes, default=self._default, config=self._config
        )

    def _requests(
        self,
        prompts: Asked,
        many: bool,
        sampling: SamplingParams | None,
        recipe: RecipeLike | None,
        budget: tuple[float | None, int | None],
    ) -> Iterator[Request]:
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise UsageError(f"sampling: expected SamplingParams, got {type(sampling).__name__}")
        found, chosen = self._named(recipe), sampling or SamplingParams()
        asked: Sequence[Any] = prompts if many and isinstance(prompts, list) else [prompts]
        for number, one in enumerate(asked):
            where = f"prompts[{number}]" if many else "prompt"
            yield Request("", self._prompt(one, where), chosen, found, *budget)

    def _named(self, recipe: RecipeLike | None) -> Recipe | str | None:
        if recipe is None or recipe == NO_RECIPE:
            return None
        if isinstance(recipe, str) and (recipe == "default" or recipe in self.recipes):
            return recipe
        return _recipe(recipe)

    def _prompt(self, asked: Any, where: str) -> Prompt:
        if isinstance(asked, Prompt):
            return asked
        if isinstance(asked, list) and _is_conversation(asked):
            return self.prompts.chat(*read_messages(asked, where))
        if isinstance(asked, str):
            text, images = asked, []
        elif isinstance(asked, tuple) and len(asked) == 2 and isinstance(asked[0], str):
            text, images = asked[0], _listed(asked[1])
        elif isinstance(asked, Mapping) and isinstance(asked.get("prompt"), str) and set(asked) <= {"prompt", "images"}:
            text, images = asked["prompt"], _listed(asked.get("images"))
        else:
            raise UsageError(
                f'{where}: expected a text, (text, images), {{"prompt": text, "images": images}}, messages or a Prompt,'
                f" got {str(asked)[:60]!r}"
            )
        names = [f"{where}.images[{number}]" for number in range(len(images))]
        return self.prompts.question(text, [to_image(i, name=n) for i, n in zip(images, names, strict=True)], where)

    def _outputs(
        self, requests: Iterable[Request], name: Callable[[int], str]
    ) -> Generator[tuple[int, Output], None, None]:
        """(number of the request, output) as they come, while at most `max_running` of them are in the engine."""
        source, call = enumerate(requests), next(self._calls)
        inbox: deque[Output] = deque()
        numbers: dict[str, int] = {}
        more = True
        try:
            while True:
                while more and len(numbers) < self._config.max_running:
                    number, request = next(source, (0, None))
                    if request is None:
                        more = False
                        break
                    numbers[self._submit(request, f"{call}-{number}", inbox, name(number))] = number
                if not numbers:
                    return
                with self._lock:
                    if not inbox:
                        self._deliver(self.engine.step())
                while inbox:
                    output = inbox.popleft()
                    number = numbers[output.id] if output.reason is None else numbers.pop(output.id)
                    yield number, output
        finally:
            with self._lock:
                for id in numbers:
                    self._inboxes.pop(id, None)
                    if self._engine is not None:
                        self._engine.abort(id)

    def _submit(self, request: Request, id: str, inbox: deque[Output], name: str) -> str:
        with self._lock:
            engine = self.engine
            own = request.recipe
            if isinstance(own, Recipe) and not set(own.candidates) <= self._bounds and not engine.busy:
                engine = self._engine = self._made([own])
            try:
                engine.submit(replace(request, id=id))
            except UsageError as error:
                raise UsageError(f"{name}{error}") from None
            self._inboxes[id] = inbox
        return id

    def _deliver(self, outputs: Iterable[Output]) -> None:
        """Hand outputs to their calls; outputs of abandoned calls are dropped."""
        for output in outputs:
            inbox = self._inboxes.get(output.id) if output.reason is None else self._inboxes.pop(output.id, None)
            if inbox is not None:
                inbox.append(output)


def _recipe(given: RecipeLike) -> Recipe:
    return given if isinstance(given, Recipe) else Recipe.load(given)


def _room(model: EngineModel, given: Mapping[str, Any]) -> dict[str, int]:
    """Defaults of an LLM: callers wait by themselves, and one long request fits into the pool."""
    page = given.get("page_tokens", EngineConfig.page_tokens)
    pages = -(-min(model.max_tokens, _POOL_TOKENS) // max(1, page))
    one = (pages + 1) * model.layers * model.block_bytes(page)
    return {"kv_bytes": max(EngineConfig.kv_bytes, one), "max_waiting": 1 << 30}


def _is_conversation(asked: Any) -> bool:
    return isinstance(asked, Sequence) and bool(asked) and isinstance(asked[0], Mapping) and "role" in asked[0]


def _listed(images: Any) -> list[Any]:
    return [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]


def _numbered(number: int) -> str:
    return f"prompts[{number}]: "


def _unnamed(number: int) -> str:
    return ""
