"""The documented shape of a study: what `quota study --json` prints and `<name>.json` holds."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from quota.core.schema import Document
from quota.eval.results import Comparison
from quota.eval.statistics import Interval


class StudyRow(Document):
    """One configuration over all questions."""

    name: str = Field(description="row name")
    weights: str = Field(description="which weights answered: `float` or what was quantized, and how it was calibrated")
    recipe: str | None = Field(description="recipe file beside the report; null for none")
    method: str | None = Field(description="the recipe's method; null for none")
    accuracy: float = Field(description="mean over tasks of the exact-match accuracy, 0 to 1")
    accuracy_by_task: dict[str, float] = Field(description="task -> accuracy, 0 to 1")
    retention: Interval = Field(
        description="percent of the float row, mean over tasks, with its 95 % paired bootstrap interval"
    )
    final_visual_tokens: int = Field(description="visual tokens of one reference image in the last layer")
    average_visual_tokens: float = Field(description="the same, mean over decoder layers")
    gmacs: float = Field(
        description=(
            "multiply-accumulates of one prefill, in 10^9: vision tower, projector, language model, text included"
        )
    )
    compute_ratio: float = Field(description="gmacs against the unpruned model")
    kv_bytes: int = Field(description="bytes of the 4-bit cache of one prefill, by the cost model")
    figures: dict[str, Any] = Field(default_factory=dict, description="what only this study measures")


class PublishedRow(Document):
    """A figure from the paper, on other models and questions."""

    name: str = Field(description="row name, as here")
    retention: float = Field(description="percent of the float model")
    measures: str = Field(description="on what")


class StudyReport(Document):
    """One study. Paths are relative to the report's folder."""

    study: str = Field(description="name of the study")
    title: str = Field(description="what it shows")
    model: str = Field(description="the float checkpoint")
    family: str = Field(description="architecture: `llava` or `qwen2_5_vl`")
    fingerprint: str = Field(description="of the float model")
    tasks: str = Field(description="where the questions came from")
    questions: int = Field(description="number of questions, the same in every row")
    questions_by_task: dict[str, int] = Field(description="task -> number of questions")
    questions_fingerprint: str = Field(description="sha256 over ids, texts and answers")
    calibration_samples: int = Field(description="number of calibration samples")
    resamples: int = Field(description="bootstrap resamples")
    seed: int = Field(description="bootstrap and calibration seed")
    rows: list[StudyRow] = Field(description="one entry per configuration; the first is the float model")
    comparisons: list[Comparison] = Field(description="paired differences of retention")
    notes: list[str] = Field(description="what is missing, and which methods beat the random floor, in sentences")
    published: list[PublishedRow] = Field(
        description="published figures of the same configurations; never mixed with the rows"
    )
    files: dict[str, str] = Field(description="what -> path")
