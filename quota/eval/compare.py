"""`quota eval`: one configuration, beside its float model when there is one."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quota.calib.stream import resolve_folder
from quota.core.files import sha256_file
from quota.core.recipe import Recipe
from quota.eval.asking import ON_CPU, Placement
from quota.eval.benchmark import Answered, AnswerFile, RowSpec, Settings, answer_all, rights, summarise, weight_bytes
from quota.eval.generation import measure_cost
from quota.eval.questions import Question, mixed_questions, questions_fingerprint, sample_questions, scene_questions
from quota.eval.results import Evaluation
from quota.nn.checkpoint import Manifest, is_quantized_folder

TIMED_QUESTIONS = 8


def folder_fingerprint(checkpoint: str | Path) -> str:
    """sha256 over the names and contents of a checkpoint folder's files (of a hub name's snapshot)."""
    path = resolve_folder(checkpoint)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return "sha256:" + digest.hexdigest()


def row_spec(name: str, checkpoint: str | Path, recipe: Path | None = None, label: str | None = None, place: Placement = ON_CPU) -> RowSpec:
    """A row whose key is the content of its checkpoint and recipe, and where it runs."""
    given, checkpoint = str(checkpoint), resolve_folder(checkpoint)
    parts = [folder_fingerprint(checkpoint), sha256_file(recipe) if recipe else "none"]
    if recipe:
        Recipe.load(recipe)  # a bad recipe is found before the first row is answered
    return RowSpec(
        name=name, checkpoint=label or given, recipe=recipe.name if recipe else None, key=" ".join(parts) + place.key,
        checkpoint_bytes=weight_bytes(checkpoint), kv_dtype=cache_dtype(checkpoint, place.dtype), open=lambda: place.open(checkpoint, recipe),
    )  # fmt: skip


def cache_dtype(checkpoint: Path, dtype: str = "float32") -> str:
    """What a cached key or value of this checkpoint is stored as, in a model whose floats are of type `dtype`."""
    if not is_quantized_folder(checkpoint):
        return dtype
    manifest = Manifest.load(checkpoint)
    return "int4" if "llm" in manifest.modules and manifest.regime == "w4a4kv4" else dtype


def questions_for(samples: Path | None, number: int, vision: Any) -> list[Question]:
    """Questions of a samples file, or `number` generated ones that suit the tower of configuration `vision`: five kinds where resolution is dynamic."""
    if samples is None:
        size_px = getattr(vision, "image_size", None)
        return mixed_questions(number) if size_px is None else scene_questions(number, 336 if size_px >= 300 else 168)
    from quota.calib.samples import Samples

    return sample_questions(Samples.load(samples))


def bars(quiet: bool = False) -> Progress:
    """Progress bars on stderr."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


def answer_rows(
    specs: Sequence[RowSpec], questions: list[Question], folder: Path, settings: Settings, opened: Callable[[RowSpec], tuple[Any, Any]], *, quiet: bool = False
) -> dict[str, tuple[dict, float]]:
    """name -> (right/wrong per task, seconds); answers are kept in `folder` under a name made from all that decides them."""
    asked = questions_fingerprint(questions)
    out = {}
    with bars(quiet) as progress:
        for spec in specs:
            bar = progress.add_task(spec.name, total=len(questions))
            key = f"{spec.key} {asked} {settings.batch} {settings.max_new_tokens}"
            name = f"answers-{spec.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
            predictions, seconds = answer_all(partial(opened, spec), questions, AnswerFile(folder / name, key), settings, partial(progress.advance, bar))
            out[spec.name] = (rights(questions, predictions), seconds)
    return out


def evaluate_checkpoint(
    checkpoint: str, recipe: Path | None, *, float_model: str | None, samples: Path | None, number: int, blind: bool, out: Path | None, settings: Settings,
) -> Evaluation:  # fmt: skip
    """Everything `quota eval` prints."""
    specs = [row_spec("float", float_model, place=settings.place)] if float_model else []
    name = Path(checkpoint).name if not recipe else f"{Path(checkpoint).name}+{recipe.stem}"
    specs.append(row_spec(name, checkpoint, recipe, place=settings.place))
    models: dict[str, tuple[Any, Any]] = {}

    def opened(spec: RowSpec) -> tuple[Any, Any]:
        if spec.name not in models:
            models[spec.name] = spec.open()
        return models[spec.name]

    questions = questions_for(samples, number, opened(specs[-1])[0].config.vision_config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        answered = answer_rows(specs, questions, folder, settings, opened)
        unseen = None
        if blind:
            without = [q.without_image() for q in questions]
            blind_spec = RowSpec(**{**specs[0].__dict__, "name": "blind"})
            unseen = answer_rows([blind_spec], without, folder, settings, lambda _: opened(specs[0]))["blind"][0]
    timed = questions[:TIMED_QUESTIONS]
    costs = measure_cost({s.name: opened(s) for s in specs}, timed)
    rows = [Answered(s, *answered[s.name], costs[s.name]) for s in specs]
    compare = [(specs[-1].name, "float")] if float_model else []
    return summarise(questions, rows, settings, baseline="float" if float_model else None, blind=unseen, compare=compare, timed_requests=len(timed))
