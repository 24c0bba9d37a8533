"""The embedded models: where each family's checkpoint and samples are, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quota.calib.stream import FloatSource
from quota.core.errors import UsageError
from quota.eval.questions import Question, mixed_questions, scene_questions, scene_tour
from quota.models import find_family
from quota.scenes import assets
from quota.scenes import kinds as k
from quota.scenes.vocabulary import QWEN_SCENE_PX

FAMILIES = assets.FAMILIES
DEFAULT = assets.DEFAULT_FAMILY


@dataclass(frozen=True)
class Embedded:
    """One family's float checkpoint folder and calibration samples."""

    family: str
    checkpoint: Path
    samples: Path


def embedded(family: str | None = None) -> Embedded:
    """The embedded model of a family (default: LLaVA). UsageError for an unknown family, CheckpointError where this
    installation does not hold it."""
    name = DEFAULT if family is None else family
    if name not in FAMILIES:
        raise UsageError(f"--family: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return Embedded(name, assets.checkpoint_of(name), assets.samples_of(name))


def sources(family: str | None, model: str | None, samples: Path | None) -> tuple[str, Path]:
    """(float checkpoint, samples file): what was given, else the embedded ones of `family`, or of the family `model`
    belongs to."""
    if model is None:
        found = embedded(family)
        return str(found.checkpoint), samples or found.samples
    if family is not None:
        raise UsageError("--family: names an embedded model, and --model another one; give one of them")
    return model, samples or assets.samples_of(FloatSource(model).family.name)


def is_dynamic(config: Any) -> bool:
    """Whether images of a model of this configuration become different numbers of visual tokens."""
    return find_family(config).visual_tokens is None


def reference_of(config: Any) -> str:
    """What a recipe's ratios are of: the image's own tokens where resolution is dynamic, else the recorded number."""
    return "per_image" if is_dynamic(config) else "recorded"


def held_out(number: int, config: Any) -> list[Question]:
    """`number` generated questions of the test split that suit a model: six tasks about scenes, or where resolution is
    dynamic five kinds of pages, a kind being a task."""
    if is_dynamic(config):
        return [replace(q, task=kind_of(q)) for q in mixed_questions(number)]
    return scene_questions(number, scene_px(config))


def kind_of(question: Question) -> str:
    """`document` of task `document/cell`."""
    return question.task.partition("/")[0]


def scene_px(config: Any) -> int:
    """Side of the generated scenes for a model of fixed resolution: the published 336 px, or half of it."""
    return 336 if config.vision_config.image_size >= 300 else 168


def tour(config: Any) -> dict[str, list[Question]]:
    """Picture name -> questions about that image, for answers side by side: one scene, and where resolution is
    dynamic one page of every kind."""
    if not is_dynamic(config):
        return {"image": scene_tour(0, scene_px(config))}
    asked = {kind_of(q): [replace(q, task=kind_of(q))] for q in mixed_questions(len(k.KINDS))}
    del asked[k.CONVERSATION]
    return {"image": scene_tour(0, QWEN_SCENE_PX), **asked}
