"""The documented shape of what `quota eval --tasks` writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quota.core.schema import Document
from quota.eval.results import Comparison
from quota.eval.statistics import Interval


class TaskRow(Document):
    """One configuration over all tasks."""

    name: str = Field(description="`float`, or the checkpoint, with the recipe behind a +")
    checkpoint: str = Field(description="which weights answered")
    recipe: str | None = Field(description="which recipe pruned; null for none")
    scores: dict[str, float] = Field(description="task -> score as lmms-eval reports it")
    retention: Interval | None = Field(
        description="percent of the float row's scores, mean over tasks; null without float row"
    )
    retention_by_task: dict[str, Interval | None] = Field(
        description="task -> the same for one task; null where the float row scores nothing"
    )
    loyalty: Interval | None = Field(
        description="percent of questions answered word for word like the float row, mean over tasks"
    )
    loyalty_by_task: dict[str, float] = Field(description="task -> the same for one task")
    visual_tokens: float = Field(description="visual tokens of a question, mean")
    average_visual_tokens: float = Field(
        description="visual tokens in the cache, mean over questions and decoder layers"
    )
    compute_ratio: float = Field(
        description=(
            "multiply-accumulates of the prefill (equations 10 to 13) over those without pruning, mean over questions"
        )
    )
    kv_bytes: float = Field(description="mean bytes of keys and values a timed request holds, in the dtype it ran with")
    prefill_ms: float = Field(
        description="median milliseconds to the first token of one request, vision tower included"
    )
    decode_ms: float = Field(description="median milliseconds per later token of one request")
    checkpoint_bytes: int = Field(description="bytes of the weight files")
    peak_memory_bytes: int | None = Field(description="most a batch held on the GPU; null on a CPU")
    power_w: float | None = Field(
        description="mean GPU power while answering; null on a CPU or where NVML cannot be read"
    )


class TaskReport(Document):
    """Rows answered on the same tasks."""

    schema_version: Literal[1] = 1
    tasks: dict[str, str] = Field(description="task -> metric")
    questions: dict[str, int] = Field(description="task -> number of questions")
    data: str | None = Field(description="folder of the local data sets; null for the hub's or the package's")
    retention_leaves_out: list[str] = Field(
        description="tasks that no retention covers, because the float row scores nothing in them"
    )
    limit: int | None = Field(description="first questions of each task that were asked; null for all")
    batch: int = Field(description="questions answered at once")
    lmms_eval: str = Field(description="version of lmms-eval")
    image_backend: str = Field(description="what turned images into pixels")
    device: str = Field(description="where the models ran")
    resamples: int = Field(description="bootstrap resamples")
    seed: int = Field(description="bootstrap seed")
    timed_requests: int = Field(description="single requests behind kv_bytes, prefill_ms and decode_ms")
    rows: list[TaskRow] = Field(description="one entry per configuration")
    comparisons: list[Comparison] = Field(description="paired differences of retention")
