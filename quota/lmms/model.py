"""`--model quota`: any supported checkpoint, float or quantized, pruned by a recipe or not, as a chat model of
lmms-eval."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import lmms_eval.api.task  # noqa: F401  (lets Pillow read truncated images from here on; taken back below)
import torch
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import ImageFile
from pydantic import Field, ValidationError
from tqdm import tqdm

from quota.core.errors import QuotaError, UsageError
from quota.core.folders import resolve_folder
from quota.core.journal import Journal
from quota.core.recipe import Recipe
from quota.core.schema import Document
from quota.eval.answering import why_not_engine
from quota.eval.asking import kept_masks
from quota.eval.compare import folder_fingerprint
from quota.eval.generation import encode_prompts, generate, room_for_answer, under
from quota.eval.gpu import measured
from quota.lmms.prompts import Conversation, Wrapper, conversation
from quota.models import find_family
from quota.models.processing import BACKEND
from quota.runtime.engine import Request, SamplingParams
from quota.runtime.llm import LLM

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image is an error everywhere but in lmms-eval's own runs

SAMPLES = 8
_LOG_SCHEMA = "quota-lmms-answers/1"


class ModelArgs(Document):
    """What `--model_args` may hold."""

    pretrained: str = Field(description="checkpoint: a folder of `quota calibrate`, a float folder or a hub name")
    recipe: str | None = Field(default=None, description="prune visual tokens by this recipe")
    batch_size: int = Field(default=1, ge=1, description="requests answered at once (--batch_size)")
    device: str = Field(default="cpu", description="torch device (--device); `cuda` becomes this process's own GPU")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="of everything that is not quantized"
    )
    answers: Path | None = Field(
        default=None, description="folder for the log of answers; a run that was stopped goes on from it"
    )
    min_pixels: int | None = Field(default=None, ge=1, description="Qwen2.5-VL: fewest pixels of an image")
    max_pixels: int | None = Field(default=None, ge=1, description="Qwen2.5-VL: most pixels of an image")

    @classmethod
    def parse(cls, given: dict[str, Any]) -> ModelArgs:
        """UsageError that names the argument and lists the known ones."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            raise UsageError(
                f"model_args: {what}, got {first['input']!r}; known: {', '.join(cls.model_fields)}"
            ) from None


class Quota(lmms):
    """Greedy answers, batched, one whole model per process; lmms-eval shares out the documents under torchrun.

    Prompts and images are those of the built-in wrappers (`quota.lmms.prompts`). With `answers=DIR` every request
    leaves a line there: text, prompt and new tokens, visual tokens per decoder layer, on a GPU peak memory and power;
    and milliseconds, null where the engine batched it with others (quantized models, whose answers are those of
    `generate`).
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.args = ModelArgs.parse(given)
        self.folder = resolve_folder(self.args.pretrained).resolve()
        self.recipe = (
            None if self.args.recipe is None else Recipe.load(self.args.recipe)
        )  # a bad one is found before a model is loaded
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = f":{os.environ['LOCAL_RANK']}" if self.args.device == "cuda" and "LOCAL_RANK" in os.environ else ""
        try:
            self.device = torch.device(self.args.device + local)
        except RuntimeError:
            raise UsageError(
                f"device: expected a torch device such as cpu or cuda:0, got {self.args.device!r}"
            ) from None
        self.failure: Exception | None = None
        self._leaves = False
        self._opened: tuple[Any, Any, Wrapper] | None = (
            None  # in a tuple: lmms-eval's clean() deletes modules it finds as attributes
        )
        self._engine: tuple[Any] | None = None  # an LLM, or None where the engine does not run the model
        self.samples: dict[str, list[Conversation]] = {}  # task -> the first ones it asked, to be timed
        self._known: dict[str, dict[str, Any]] = {}
        self._journal = self._open_journal()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Quota:
        """How lmms-eval's own command makes a model. That command ends with status 0 whatever fails, so from here on a
        failure ends the process."""
        try:
            given = {
                **utils.simple_parse_args_string(arg_string),
                **{k: v for k, v in (additional_config or {}).items() if v is not None},
            }
            made = cls(**given)
            made.opened()
        except QuotaError as error:
            leave(error)
        made._leaves = True
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # the process is lmms-eval's
        return made

    # -- the model -----------------------------------------------------------------------------------------------------

    def opened(self) -> tuple[Any, Any, Wrapper]:
        """(model without the recipe, processor, wrapper), loaded when first needed."""
        if self._opened is None:
            from quota.runtime.load import load_model

            args = self.args
            model, processor = load_model(self.folder, None, str(self.device), getattr(torch, args.dtype))
            self._opened = (model, processor, Wrapper(model.config, processor, (args.min_pixels, args.max_pixels)))
        return self._opened

    def content(self) -> str:
        """Names all that decides an answer besides the request."""
        a = self.args
        pruned = hashlib.sha256(self.recipe.dumps().encode()).hexdigest() if self.recipe else "none"
        return (
            f"{folder_fingerprint(self.folder)} {pruned} {a.dtype} {a.batch_size} {a.min_pixels} {a.max_pixels}"
            f" {BACKEND}"
        )

    def _open_journal(self) -> Journal | None:
        if self.args.answers is None:
            return None
        content = self.content()
        folder = self.args.answers.resolve()
        header = {
            "schema": _LOG_SCHEMA,
            "content": content,
            "checkpoint": self.args.pretrained,
            "recipe": self.args.recipe,
        }
        name = f"answers-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        mine = Journal(folder / f"{name}-rank{self.rank}.jsonl", header)
        for path in sorted(folder.glob(f"{name}-rank*.jsonl")):
            rows = mine.rows if path == mine.path else Journal(path, header).rows
            self._known.update({row["request"]: row for row in rows})
        return mine

    # -- requests ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One result per request, in order."""
        try:
            return self._answer_all(requests)
        except Exception as error:
            self.failure = error
            if self._leaves:
                leave(error)
            raise

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise UsageError(
            "task: asks for likelihoods of given answers; quota answers by generating, choose a generate_until task"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise UsageError("task: asks in several rounds; quota answers one prompt, choose a generate_until task")

    def conversation(self, request: Instance) -> Conversation:
        """The request's document as chat messages, images as the processor gets them."""
        _, to_messages, _, doc_id, task, split = request.args
        return conversation(to_messages(self.task_dict[task][split][doc_id]), task)

    def records(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(task, document) -> what its answer took; of every request answered or found so far."""
        return {(row["task"], row["doc_id"]): row for row in self._known.values()}

    def _answer_all(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        rows: list[dict[str, Any] | None] = [None] * len(requests)
        new, began = 0, time.perf_counter()
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0 or None) as bar:
            for places in _batches(requests, self.args.batch_size):
                batch = [requests[place] for place in places]
                asked = [self.conversation(request) for request in batch]
                for request, one in zip(batch, asked, strict=True):
                    first = self.samples.setdefault(request.args[4], [])
                    if len(first) < SAMPLES and len(one.messages) == 1 and len(one.images) <= 1:
                        first.append(one)
                keys = [_key(request, one) for request, one in zip(batch, asked, strict=True)]
                if not all(key in self._known for key in keys):
                    fresh = self._answer(batch, asked, keys)
                    new += sum(row["new_tokens"] for row in fresh)
                    self._known.update(zip(keys, fresh, strict=True))
                    if self._journal is not None:
                        self._journal.append(fresh)
                for place, key in zip(places, keys, strict=True):
                    rows[place] = self._known[key]
                bar.update(len(places))
        seconds = time.perf_counter() - began
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=new,
            avg_speed=new / seconds,
            additional_metrics={"rank": self.rank},
        )
        return [
            GenerationResult(row["text"], TokenCounts(row["prompt_tokens"], row["new_tokens"]))
            for row in rows
            if row is not None
        ]

    def _answer(
        self, batch: Sequence[Instance], asked: Sequence[Conversation], keys: Sequence[str]
    ) -> list[dict[str, Any]]:
        model, processor, wrapper = self.opened()
        if self._engine is None:
            self._engine = (_engine_of(model, processor, self.recipe, self.args.batch_size),)
        most = _options(batch[0]).get("max_new_tokens", wrapper.max_new_tokens)
        shown = [(wrapper.render(one), [wrapper.prepare(image) for image in one.images]) for one in asked]
        made = self._by_generate(shown, most) if self._engine[0] is None else self._by_engine(shown, most)
        return [
            {"request": key, "task": request.args[4], "doc_id": request.args[3], **row, "batch": len(batch)}
            for request, key, row in zip(batch, keys, made, strict=True)
        ]

    def _by_engine(self, shown: Sequence[tuple[str, list[Any]]], most: int) -> list[dict[str, Any]]:
        """Rows of one batch; times are not a request's own there, so there are none."""
        assert self._engine is not None
        llm: LLM = self._engine[0]
        with measured(self.device) as gpu:
            prompts = (llm.prompts.rendered(text, images) for text, images in shown)
            done = list(llm.run(Request("", prompt, SamplingParams(max_tokens=most)) for prompt in prompts))
        return [
            {
                "text": one.text,
                "prompt_tokens": one.usage.prompt_tokens,
                "new_tokens": len(one.tokens),
                "visual_tokens": one.usage.visual_tokens,
                "visual_tokens_by_layer": list(one.usage.visual_by_layer),
                "prefill_ms": None,
                "decode_ms": None,
                "peak_memory_bytes": gpu and gpu.peak_bytes,
                "power_w": gpu and gpu.power_w,
            }
            for one in done
        ]

    def _by_generate(self, shown: Sequence[tuple[str, list[Any]]], most: int) -> list[dict[str, Any]]:
        model, processor, _ = self.opened()
        inputs = encode_prompts(
            model, processor, [text for text, _ in shown], [image for _, images in shown for image in images]
        )
        stop = processor.tokenizer.eos_token_id
        longest = min(most, room_for_answer(model, inputs["input_ids"].shape[1]))
        with under(model, self.recipe):
            made = generate(model, inputs, max_new_tokens=longest, stop=stop)
            masks = kept_masks(model)
        texts = processor.batch_decode(made.new_ids, skip_special_tokens=True)
        visual = find_family(model).visual(inputs).cpu()
        kept = {layer: (torch.as_tensor(mask).cpu() & visual).sum(1).tolist() for layer, mask in masks.items()}
        layers = model.config.get_text_config().num_hidden_layers
        shared = {
            "prefill_ms": round(made.prefill_ms, 3),
            "decode_ms": made.decode_ms and round(made.decode_ms, 3),
            "peak_memory_bytes": made.gpu and made.gpu.peak_bytes,
            "power_w": made.gpu and made.gpu.power_w,
        }
        out = []
        for row, text in enumerate(texts):
            seen = int(visual[row].sum())
            out.append(
                {
                    "text": text,
                    "prompt_tokens": int(inputs["attention_mask"][row].sum()),
                    "new_tokens": _length(made.new_ids[row].tolist(), stop),
                    "visual_tokens": seen,
                    "visual_tokens_by_layer": _by_layer(
                        seen, {layer: counts[row] for layer, counts in kept.items()}, layers
                    ),
                    **shared,
                }
            )
        return out


def _engine_of(model: Any, processor: Any, recipe: Recipe | None, most: int) -> LLM | None:
    """An engine that gives the answers `generate` gives with the tokenizer's end token alone; None where there is
    none."""
    if why_not_engine(model) is not None:
        return None
    llm = LLM(model, recipe=recipe, max_running=most)
    return llm if llm.engine.eos == {processor.tokenizer.eos_token_id} else None


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Places of one task's requests with equal generation options, in order: always the same slices, so a resumed run
    batches like an unbroken one."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(json.dumps([request.args[4], request.args[2]], sort_keys=True, default=str), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _options(request: Instance) -> dict[str, Any]:
    options: dict[str, Any] = request.args[2]
    if options.get("do_sample") or options.get("temperature") or (options.get("num_beams") or 1) > 1:
        raise UsageError(
            f"task {request.args[4]}: asks for sampling or beams ({options}); quota answers greedily, override with"
            " --gen_kwargs temperature=0"
        )
    return options


def _key(request: Instance, asked: Conversation) -> str:
    _, _, options, doc_id, task, split = request.args
    said = json.dumps([task, split, doc_id, options, asked.fingerprint()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _length(ids: list[int], stop: int) -> int:
    """New tokens of one row, the stop token included, what was padded after it not."""
    return ids.index(stop) + 1 if stop in ids else len(ids)


def _by_layer(visual: int, kept: dict[int, int], layers: int) -> list[int]:
    counts, alive = [], visual
    for layer in range(layers):
        alive = kept.get(layer, min([alive, *(n for at, n in kept.items() if at < 0)]))
        counts.append(alive)
    return counts


def leave(error: Exception) -> NoReturn:
    """End the process with status 1 and the reason on stderr; faults of quota keep their traceback."""
    if isinstance(error, QuotaError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    raise SystemExit(1) from error
