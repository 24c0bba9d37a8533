"""The same questions to one model under several recipes, answered together.

A quantized model answers through the engine: every image is prepared and encoded once for all rows, and rows and
questions are one continuous batch. Any other model answers by `generate` in left-padded batches, rows taking turns on a
batch, so that its images are prepared and encoded once too. Either way a question gets the text that it gets alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quota.core.journal import Journal
from quota.core.threads import one_thread
from quota.eval.generation import check_questions, decoded, encode, generate, room_for_answer, under
from quota.eval.questions import Question, chunks
from quota.eval.score import is_right
from quota.models import find_family
from quota.models.copies import copies_of, is_small

if TYPE_CHECKING:
    from quota.core.recipe import Recipe

_ANSWERS_SCHEMA = "quota-answers/1"
_TOGETHER = 32  # requests in an engine; their prompts hold pixels, and what one thread took no other can
_STEP_TOKENS = 2048  # no client waits for a step: several whole prompts at once
# fields of a generation configuration that leave greedy answers alone, or that the engine follows
_HARMLESS = frozenset(
    {"_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    | {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "num_beams"}
    | {"output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"}
)


class AnswerFile(Journal):
    """Answers of one row, one JSON line each, appended batch by batch. A file of another key is not reused."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, {"schema": _ANSWERS_SCHEMA, "key": key})

    @property
    def known(self) -> dict[str, str]:
        """Question id -> prediction."""
        return {row["id"]: row["prediction"] for row in self.rows}

    def add(self, batch: Sequence[Question], predictions: Sequence[str]) -> None:
        self.append(
            [
                {
                    "id": q.id,
                    "task": q.task,
                    "instruction": q.instruction,
                    "answer": q.answer,
                    "prediction": p,
                    "right": is_right(p, q.answer),
                }
                for q, p in zip(batch, predictions, strict=True)
            ]
        )


@dataclass(frozen=True, eq=False)
class Row:
    """Answers under `recipe` go into `file`. advance: told how many questions were settled."""

    recipe: Recipe | None
    file: AnswerFile
    advance: Callable[[int], Any] = lambda count: None


Opened = tuple[Any, Any]  # model without a recipe, processor
Batch = tuple[list[Question], list[Row]]  # questions, and the rows that lack them


def answer_together(
    opened: Callable[[], Opened], rows: Sequence[Row], questions: list[Question], batch: int, tokens: int
) -> float:
    """Fill the rows' files; seconds spent, 0 where nothing was missing.

    opened: called only when something is left to answer. Questions are taken in slices of at most `batch`; a row's
    answers to one are on disk when the last of them is there.
    """
    began = time.perf_counter()
    known = [set(row.file.known) for row in rows]
    if all(q.id in done for done in known for q in questions):
        for row in rows:
            row.advance(len(questions))
        return 0.0
    model, processor = opened()
    made = _by_generate if why_not_engine(model) else _by_engine
    if made is _by_generate:  # prompts of one length need no padding, and attention then no mask
        questions = sorted(questions, key=lambda q: len(q.instruction.split()))
    threads = torch.get_num_threads() if is_small(model) else 1
    work = list[Batch]()
    for part in chunks(questions, min(batch, -(-len(questions) // (2 * threads))) if threads > 1 else batch):
        lacking = [row for row, done in zip(rows, known, strict=True) if not all(q.id in done for q in part)]
        for row in rows:
            if row not in lacking:
                row.advance(len(part))
        if lacking:
            check_questions(processor, part)
            work.append((part, lacking))
    recipes = [row.recipe for row in rows if row.recipe is not None]
    todo, lock = _Shared(work), threading.Lock()

    def work_off(own: Opened) -> None:
        try:
            for row, part, texts in made(*own, todo, recipes, tokens):
                with lock:
                    row.file.add(part, texts)
                    row.advance(len(part))
        finally:  # after an exception the others end too
            todo.end()

    with _copies(model, processor, min(threads, len(work))) as copies:
        if len(copies) == 1:
            work_off(copies[0])
        else:
            with ThreadPoolExecutor(len(copies)) as pool:
                try:
                    for _ in pool.map(work_off, copies):
                        pass
                finally:
                    todo.end()
    return time.perf_counter() - began


class _Shared(Iterator[Batch]):
    """Batches for whichever thread asks."""

    def __init__(self, work: Sequence[Batch]) -> None:
        self._left, self._lock = iter(work), threading.Lock()

    def __next__(self) -> Batch:
        with self._lock:
            return next(self._left)

    def end(self) -> None:
        """Give out no more."""
        with self._lock:
            self._left = iter(())


@contextmanager
def _copies(model: Any, processor: Any, count: int) -> Iterator[list[Opened]]:
    """Copies of a model for `count` threads, whose operations run on one thread each."""
    with one_thread() if count > 1 else nullcontext():
        yield copies_of((model, processor), count)


def why_not_engine(model: Any) -> str | None:
    """Why a loaded model's answers come from `generate`, None where the engine gives the same ones."""
    from quota.runtime.llm import why_not

    asked = sorted(set(model.generation_config.to_diff_dict()) - _HARMLESS) if model.can_generate() else []
    return why_not(model) or (f"generation_config: {asked[0]} is not the engine's" if asked else None)


Made = Iterator[tuple[Row, list[Question], list[str]]]


def _by_engine(model: Any, processor: Any, work: Iterator[Batch], recipes: Sequence[Recipe], tokens: int) -> Made:
    from quota.runtime.engine import Request, SamplingParams
    from quota.runtime.llm import LLM

    taken: deque[Batch] = deque()

    def requests() -> Iterator[Request]:
        for part, lacking in work:
            taken.append((part, lacking))
            for q in part:
                prompt = llm.prompts.question(q.instruction, [] if q.open_image is None else [q.open_image()])
                for row in lacking:
                    yield Request("", prompt, sampling, row.recipe)

    sampling = SamplingParams(max_tokens=tokens)
    with LLM(
        model,
        recipe={str(number): recipe for number, recipe in enumerate(recipes)},
        max_running=_TOGETHER,
        step_tokens=_STEP_TOKENS,
    ) as llm:
        done = llm.run(requests())
        for first in done:
            part, lacking = taken.popleft()
            answers = chain([first], islice(done, len(part) * len(lacking) - 1))
            texts = [completion.text.strip() for completion in answers]
            yield from ((row, part, texts[number :: len(lacking)]) for number, row in enumerate(lacking))


def _by_generate(model: Any, processor: Any, work: Iterator[Batch], recipes: Sequence[Recipe], tokens: int) -> Made:
    with images_encoded_once(model):
        for part, lacking in work:
            inputs = encode(model, processor, part)
            longest = min(tokens, room_for_answer(model, inputs["input_ids"].shape[1]))
            for row in lacking:
                with under(model, row.recipe):
                    texts = decoded(processor, generate(model, inputs, max_new_tokens=longest))
                yield row, part, texts


@contextmanager
def images_encoded_once(model: Any) -> Iterator[None]:
    """While open, the tower does not encode again the pixels it encoded last. Its hooks run all the same."""
    tower = model.get_submodule(find_family(model).vision_path)
    forward = tower.forward
    last: list[Any] = [None, None]

    @wraps(forward)  # transformers looks at the signature
    def once(*args: Any, **options: Any) -> Any:
        pixels = args[0] if args else options["pixel_values" if "pixel_values" in options else "hidden_states"]
        known = last[0]  # kept, so that its memory is not reused
        if known is None or (known.data_ptr(), known.shape) != (pixels.data_ptr(), pixels.shape):
            last[:] = pixels, forward(*args, **options)
        output = last[1]
        return output if isinstance(output, tuple) else type(output)(**output)  # callers write into it

    tower.forward = once
    try:
        yield
    finally:
        del tower.forward
