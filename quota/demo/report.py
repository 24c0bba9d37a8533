"""The documented shape of `demo-out/report.json`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from quota.core.schema import Document
from quota.eval.results import Evaluation
from quota.scenes.assets import DEFAULT_FAMILY

REPORT_VERSION = 1


class Stage(Document):
    stage: str = Field(description="stage name")
    seconds: float = Field(description="seconds it took when it ran")
    reused: bool = Field(description="true when this run took it from the cache")


class Environment(Document):
    quota: str = Field(description="version of quota")
    python: str = Field(description="version of Python")
    torch: str = Field(description="version of torch")
    transformers: str = Field(description="version of transformers")
    cpu: str = Field(description="processor name")
    threads: int = Field(description="torch's threads")
    native: str = Field(description="native library in use, or why not")


class ModelFacts(Document):
    checkpoint: str = Field(description="`embedded`, or what --model said")
    family: str = Field(default=DEFAULT_FAMILY, description="architecture: `llava` or `qwen2_5_vl`")
    fingerprint: str = Field(description="model fingerprint that recipes carry")
    parameters: int = Field(description="number of parameters")
    layers: int = Field(description="decoder layers")
    visual_tokens: int = Field(
        description="visual tokens of one image; of the median calibration image where resolution is dynamic"
    )
    image_size_px: int | None = Field(description="side of the vision tower's input; null where resolution is dynamic")
    float_bytes: int = Field(description="bytes of the float weight files")
    samples: int = Field(description="calibration samples")
    samples_fingerprint: str = Field(description="fingerprint of the calibration samples")


class SideBySide(Document):
    task: str = Field(description="kind of question")
    image: str | None = Field(
        default=None,
        description="file of the image asked about; null for none, and in reports of before it was recorded",
    )
    question: str = Field(description="text asked")
    expected: str = Field(description="the right answer")
    answers: dict[str, str] = Field(description="row name -> answer")
    right: dict[str, bool] = Field(
        description="row name -> exact match of the first words; empty for a caption, whose order is free"
    )


class Report(Document):
    """Everything `quota demo` found out. Paths are relative to the report's folder."""

    schema_version: int = Field(default=REPORT_VERSION, description="version of these field names")
    environment: Environment = Field(description="what it ran on")
    model: ModelFacts = Field(description="the float model and its samples")
    keep: float = Field(description="final keep ratio asked for")
    calibration: dict[str, Any] = Field(
        description=(
            "the calibrator's report: settings and, per block, error before (round to nearest) and after, and SQNR"
        )
    )
    recipes: dict[str, dict[str, Any]] = Field(
        description="`collaborative` and `uniform` -> what `quota recipe explain --json` prints"
    )
    profile: dict[str, Any] = Field(
        description="per decoder layer: concentration with quartiles, redundancy, sensitivity"
    )
    answers: list[SideBySide] = Field(description="questions answered by three rows")
    evaluation: Evaluation = Field(description="the held-out questions in all rows")
    files: dict[str, str] = Field(
        description=(
            "what -> path: `image`, `overlay`, of other kinds `chart` and `overlay-chart`, `profile_plot`,"
            " `recipe_plot`, `quantized`, `recipe`, `uniform_recipe`"
        )
    )
    stages: list[Stage] = Field(description="seconds per stage")
