"""`quota eval`: one configuration, beside its float model when there is one."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quota.core.checkpoint import Manifest, is_quantized_folder
from quota.core.errors import UsageError
from quota.core.files import atomic_write_text, sha256_file
from quota.core.folders import resolve_folder
from quota.core.recipe import Recipe
from quota.eval.answering import AnswerFile, Row, answer_together
from quota.eval.benchmark import Answered, RowSpec, Settings, rights, summarise, weight_bytes
from quota.eval.generation import check_questions, measure_cost
from quota.eval.questions import Question, mixed_questions, questions_fingerprint, sample_questions, scene_questions
from quota.eval.results import Evaluation
from quota.runtime.load import ON_CPU, Placement

TIMED_QUESTIONS = 8
FLOAT = "float"


def folder_fingerprint(checkpoint: str | Path) -> str:
    """sha256 over the names and contents of a checkpoint folder's files (of a hub name's snapshot)."""
    path = resolve_folder(checkpoint)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return "sha256:" + digest.hexdigest()


def row_spec(
    name: str, checkpoint: str | Path, recipe: Path | None = None, label: str | None = None, place: Placement = ON_CPU
) -> RowSpec:
    """A row whose key is the content of its checkpoint and recipe, and where it runs."""
    given, checkpoint = str(checkpoint), resolve_folder(checkpoint)
    weights = folder_fingerprint(checkpoint) + place.key
    plan = Recipe.load(recipe) if recipe else None  # a bad recipe is found before the first row is answered
    return RowSpec(
        name=name,
        checkpoint=label or given,
        recipe=recipe.name if recipe else None,
        key=f"{weights} {plan.dumps() if plan else 'none'}",
        checkpoint_bytes=weight_bytes(checkpoint),
        kv_dtype=cache_dtype(checkpoint, place.dtype),
        weights=weights,
        plan=plan,
        open=lambda: place.open(checkpoint),
    )


def cache_dtype(checkpoint: Path, dtype: str = "float32") -> str:
    """What a cached key or value of this checkpoint is stored as, in a model whose floats are of type `dtype`."""
    if not is_quantized_folder(checkpoint):
        return dtype
    manifest = Manifest.load(checkpoint)
    kv = manifest.scheme.kv if "llm" in manifest.modules else None
    return dtype if kv is None else kv.dtype


def questions_for(samples: Path | None, number: int, vision: Any) -> list[Question]:
    """Questions of a samples file, or `number` generated ones that suit the tower of configuration `vision`: five kinds
    where resolution is dynamic."""
    if samples is None:
        size_px = getattr(vision, "image_size", None)
        return mixed_questions(number) if size_px is None else scene_questions(number, 336 if size_px >= 300 else 168)
    from quota.calib.samples import Samples

    return sample_questions(Samples.load(samples))


def bars(quiet: bool = False) -> Progress:
    """Progress bars on stderr."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


def answer_rows(
    specs: Sequence[RowSpec],
    questions: list[Question],
    folder: Path,
    settings: Settings,
    opened: Callable[[RowSpec], tuple[Any, Any]],
    *,
    quiet: bool = False,
) -> dict[str, tuple[dict, float]]:
    """name -> (right/wrong per task, seconds); answers are kept in `folder` under a name made from all that decides
    them. Rows of the same weights are answered together and share the seconds. opened: as `RowSpec.open`."""
    asked = questions_fingerprint(questions)
    files: dict[str, AnswerFile] = {}
    seconds = dict.fromkeys((spec.name for spec in specs), 0.0)
    with bars(quiet) as progress:
        ticks = {spec.name: progress.add_task(spec.name, total=len(questions)) for spec in specs}
        for spec in specs:
            key = f"{spec.key} {asked} {settings.batch} {settings.max_new_tokens}"
            name = f"answers-{spec.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
            files[spec.name] = AnswerFile(folder / name, key)
        for weights in dict.fromkeys(spec.weights for spec in specs):
            own = [spec for spec in specs if spec.weights == weights]
            rows = [Row(s.plan, files[s.name], partial(progress.advance, ticks[s.name])) for s in own]
            lacking = [s.name for s, row in zip(own, rows, strict=True) if len(row.file.known) < len(questions)]
            spent = answer_together(partial(opened, own[0]), rows, questions, settings.batch, settings.max_new_tokens)
            seconds |= dict.fromkeys(lacking, spent / max(1, len(lacking)))
    known = {name: file.known for name, file in files.items()}
    return {name: (rights(questions, [done[q.id] for q in questions]), seconds[name]) for name, done in known.items()}


@dataclass(frozen=True)
class EvalRequest:
    """What every row answers. samples: a file instead of `number` generated questions; blind: also without the image;
    out: folder to continue from."""

    samples: Path | None = None
    number: int = 600
    blind: bool = False
    out: Path | None = None
    quiet: bool = False


def row_names(checkpoint: str, recipes: Sequence[Path | None], float_model: str | None) -> list[str]:
    """One row per recipe, None for the unpruned one. UsageError where two rows would share a name, the float model's
    among them where there is one."""
    own = Path(checkpoint).resolve().name
    names = [own if recipe is None else f"{own}+{recipe.stem}" for recipe in recipes]
    rows = [FLOAT, *names] if float_model else names
    if len(set(rows)) < len(rows):
        raise UsageError(f"--recipe: rows would share a name ({', '.join(rows)}); rename a file or folder")
    return names


class _Stages:
    """Says what is going on, and keeps how long it took."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds = dict.fromkeys(("opening", "answering", "timing"), 0.0)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        self.console.print(text, markup=False, highlight=False)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds[name] + time.perf_counter() - began, 2)


def evaluate_checkpoint(
    checkpoint: str, recipes: Sequence[Path | None], *, float_model: str | None, asked: EvalRequest, settings: Settings
) -> Evaluation:
    """Everything `quota eval` prints: a row per recipe (None: unpruned), before them the float model's. Later rows are
    compared with the first."""
    stages = _Stages(asked.quiet)
    names = row_names(checkpoint, recipes, float_model)
    with stages.stage("opening", f"reading {checkpoint}" + (f" and {float_model}" if float_model else "")):
        specs = [row_spec(FLOAT, float_model, place=settings.place)] if float_model else []
        specs += [
            row_spec(name, checkpoint, recipe, place=settings.place)
            for name, recipe in zip(names, recipes, strict=True)
        ]
    models: dict[str, tuple[Any, Any]] = {}

    def opened(spec: RowSpec) -> tuple[Any, Any]:
        if spec.weights not in models:
            with stages.stage("opening", f"opening {spec.checkpoint}"):
                models[spec.weights] = spec.open()
        return models[spec.weights]

    model, processor = opened(specs[-1])
    questions = questions_for(asked.samples, asked.number, model.config.vision_config)
    check_questions(processor, questions)
    for spec in specs:
        opened(spec)
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.out or Path(scratch)
        with stages.stage("answering", f"asking {len(questions)} questions"):
            answered = answer_rows(specs, questions, folder, settings, opened, quiet=asked.quiet)
            unseen = None
            if asked.blind:
                without = [q.without_image() for q in questions]
                blind_spec = replace(specs[0], name="blind")
                unseen = answer_rows(
                    [blind_spec], without, folder, settings, lambda _: opened(specs[0]), quiet=asked.quiet
                )["blind"][0]
    timed = questions[:TIMED_QUESTIONS]
    with (
        stages.stage("timing", f"timing {len(timed)} single requests per row, in turns"),
        bars(asked.quiet) as progress,
    ):
        bar = progress.add_task("timing", total=len(specs) * (len(timed) + 1))
        costs = measure_cost(
            {s.name: (*opened(s), s.plan) for s in specs}, timed, progress=partial(progress.advance, bar)
        )
    rows = [Answered(s, *answered[s.name], costs[s.name]) for s in specs]
    compare = [(name, FLOAT) for name in names if float_model] + [(name, names[0]) for name in names[1:] if float_model]
    stages.console.print(f"{settings.resamples} resamples", markup=False, highlight=False)
    made = summarise(
        questions,
        rows,
        settings,
        baseline=FLOAT if float_model else None,
        blind=unseen,
        compare=compare,
        timed_requests=len(timed),
    )
    result = made.model_copy(update={"seconds_by_stage": stages.seconds})
    if asked.out is not None:
        atomic_write_text(asked.out / "eval.json", result.model_dump_json(indent=1) + "\n")
    return result
