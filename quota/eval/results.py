"""The documented shape of an evaluation: what `quota eval --json` prints and `report.json` holds under `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quota.core.schema import Document
from quota.eval.statistics import Interval


class Row(Document):
    """One configuration over all questions."""

    name: str = Field(description="row name, e.g. `float`, `quant-only`, `collaborative`")
    checkpoint: str = Field(description="which weights answered")
    recipe: str | None = Field(description="which recipe pruned; null for none")
    accuracy: float = Field(description="mean over tasks of the exact-match accuracy, 0 to 1")
    accuracy_by_task: dict[str, float] = Field(description="task -> exact-match accuracy, 0 to 1")
    retention: Interval | None = Field(
        description=(
            "percent of the float row, mean over tasks, with its 95 % paired bootstrap interval; null without float row"
        )
    )
    retention_by_task: dict[str, float | None] = Field(
        description="task -> percent of the float row; null where the float row gets nothing right"
    )
    below_majority: list[str] | None = Field(
        default=None,
        description=(
            "tasks in which always giving the most frequent answer is right more often; null in reports of before it"
            " was recorded"
        ),
    )
    prefill_ms: float = Field(
        description="median milliseconds to the first token of one request, vision tower included"
    )
    decode_ms: float = Field(description="median milliseconds per later token of one request")
    prefill_ms_by_request: list[float] | None = Field(
        default=None,
        description=(
            "the timed requests' own milliseconds to the first token, in order; null in reports of before it was"
            " recorded"
        ),
    )
    decode_ms_by_request: list[float] | None = Field(default=None, description="the same per later token")
    kv_bytes: float = Field(
        description="mean bytes of keys and values one timed request holds, in the dtype it ran with"
    )
    kv_dtype: str = Field(
        description="what a cached number is stored as: `float32`, or `int4` with its scales and zeros counted"
    )
    checkpoint_bytes: int = Field(description="bytes of the weight files")
    average_visual_tokens: float = Field(description="visual tokens in the cache, mean over decoder layers")
    visual_tokens_by_layer: list[float] = Field(description="visual tokens in each decoder layer's cache")
    answer_seconds: float = Field(
        description=(
            "seconds to answer all questions, an equal share where rows of the same weights are answered together (0"
            " when reused)"
        )
    )
    gpu_peak_bytes: int | None = Field(
        default=None, description="most memory that tensors held on the GPU in a timed request; null without a GPU"
    )
    gpu_power_w: float | None = Field(
        default=None, description="average power of the GPU's board over the timed requests; null where not measured"
    )
    gpu_power_why_not: str | None = Field(default=None, description="why there is no power although a GPU ran the row")


class Comparison(Document):
    """Difference of two rows' retention on the same resampled questions."""

    row: str = Field(description="the row compared")
    against: str = Field(description="the row it is compared with")
    difference: Interval = Field(description="retention of `row` minus retention of `against`, percentage points")
    corrected: Interval | None = Field(
        default=None,
        description=(
            "the same with an interval that holds for all comparisons of the table at once; null in reports of before"
            " it was recorded"
        ),
    )
    verdict: Literal["better", "worse", "undecided"] = Field(
        description=(
            "`better`: the whole interval is above 0; `worse`: below; else `undecided`. By the corrected interval where"
            " there is one"
        )
    )


class Evaluation(Document):
    """Rows answered on the same questions."""

    questions: int = Field(description="number of held-out questions, the same in every row")
    questions_by_task: dict[str, int] = Field(description="task -> number of questions")
    questions_fingerprint: str = Field(description="sha256 over ids, texts and answers")
    majority_accuracy_by_task: dict[str, float] = Field(description="always giving the task's most frequent answer")
    retention_leaves_out: list[str] | None = Field(
        default=None,
        description=(
            "tasks that no retention covers, because the float row gets nothing right in them; null in reports of"
            " before it was recorded"
        ),
    )
    blind_accuracy_by_task: dict[str, float] | None = Field(
        description="the first row's model asked without the image; null when not run"
    )
    resamples: int = Field(description="bootstrap resamples")
    seed: int = Field(description="bootstrap seed")
    image_backend: str | None = Field(
        default=None, description="what turned images into pixels (`pil`); null in reports of before it was recorded"
    )
    seconds_by_stage: dict[str, float] | None = Field(
        default=None,
        description=(
            "stage of the run (opening, answering, timing) -> seconds it took; null where the caller keeps its own"
            " (`stages`)"
        ),
    )
    timed_requests: int = Field(description="single requests behind prefill_ms, decode_ms, kv_bytes and visual tokens")
    rows: list[Row] = Field(description="one entry per configuration")
    comparisons: list[Comparison] = Field(description="paired differences")
