"""A synthetic checkpoint is an ordinary quantized one, and a job answers in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.model.archs import ARCHS, config_of
from benchmarks.model.measure import Job, checkpoint_bytes, measure, recipe_for
from benchmarks.model.run import Request, ensure_checkpoint, run
from benchmarks.model.synthetic import make_checkpoint, quantized_skeleton
from quota.core.errors import QuotaError, UsageError
from quota.models import find_family
from quota.models.quantize import weight_bytes
from quota.runtime.load import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(config_of("embedded", 4), tmp_path_factory.mktemp("synthetic") / "embedded")


def test_it_loads_and_is_the_same_for_the_same_seed(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, dtype=torch.bfloat16)
    other = load(make_checkpoint(config_of("embedded", 4), tmp_path / "again"), dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    w_scale = model.model.language_model.layers[0].mlp.gate_up_proj.w_scale
    assert bool((w_scale > 0).all())


def test_the_recipe_fits_and_ends_at_the_asked_share(checkpoint: Path) -> None:
    recipe = recipe_for(load(checkpoint, dtype=torch.bfloat16), 0.3)
    assert recipe.candidates == (2, 3) and recipe.keep == (0.65, 0.3)


def test_a_job_measures_and_pruning_shrinks_the_cache(checkpoint: Path) -> None:
    whole, pruned = (measure(Job("embedded", str(checkpoint), keep, requests=1)) for keep in (None, 0.3))
    assert whole["cache_tokens"] == [640 + 31] * 4
    assert pruned["cache_tokens"] == [671, 671, 671 - 576 + 375, 671 - 576 + 173]
    assert (
        pruned["kv_bytes"] < whole["kv_bytes"] and whole["ttft_ms"] > 0 and whole["peak_rss_bytes"] > whole["kv_bytes"]
    )


def test_the_float_baseline_runs() -> None:
    found = measure(Job("embedded", None, None, "bfloat16", layers=2, requests=1))
    assert found["layers"] == 2 and found["cache_tokens"] == [671, 671]


def test_a_failing_job_says_why(tmp_path: Path) -> None:
    with pytest.raises(QuotaError, match=r"quota: its process ended with status 1: .*nowhere"):
        measure(Job("embedded", str(tmp_path / "nowhere"), requests=1))


def test_an_existing_checkpoint_is_used_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("embedded", tmp_path, None, 4, floats=(), requests=1)
    made = ensure_checkpoint(request)
    before = made.stat().st_mtime_ns
    assert ensure_checkpoint(request) == made and made.stat().st_mtime_ns == before
    out = tmp_path / "model.jsonl"
    first = list(run(request, made, out))
    monkeypatch.setattr("benchmarks.model.run.measure", lambda job: pytest.fail("measured again"))
    assert list(run(request, made, out)) == first and first[0]["checkpoint_bytes"] == checkpoint_bytes(made)


@pytest.mark.parametrize(
    ("arch", "float_bytes", "most"), [("llava-1.5-7b", 14.13e9, 3.97e9), ("qwen2.5-vl-7b", 16.58e9, 5.86e9)]
)
def test_full_size_fits_the_published_figure(arch: str, float_bytes: float, most: float) -> None:
    """Bytes of every tensor by shape alone; the published float figure is 16 bits for every parameter."""
    config = config_of(arch)
    with torch.device("meta"):
        floats = getattr(transformers, find_family(config).model_class)._from_config(config)
    assert abs(2 * sum(p.numel() for p in floats.parameters()) - float_bytes) < 0.01e9
    assert weight_bytes(quantized_skeleton(config)) <= most


def test_qwen_runs_whole_pruned_and_as_floats(tmp_path: Path) -> None:
    folder = make_checkpoint(config_of("embedded-qwen", 4), tmp_path / "embedded-qwen")
    whole, pruned = (measure(Job("embedded-qwen", str(folder), keep, requests=1)) for keep in (None, 0.3))
    assert whole["cache_tokens"] == [640 + 31] * 4 and whole["visual_tokens"] == 576
    assert pruned["cache_tokens"] == [671, 671, 671 - 576 + 375, 671 - 576 + 173]
    assert measure(Job("embedded-qwen", None, None, "bfloat16", layers=2, requests=1))["cache_tokens"] == [671, 671]


def test_choices_are_checked() -> None:
    with pytest.raises(UsageError, match="--arch"):
        config_of("gpt-5")
    with pytest.raises(UsageError, match="--layers"):
        config_of("embedded", 99)
    assert set(ARCHS) == {"llava-1.5-7b", "qwen2.5-vl-7b", "135m", "embedded", "embedded-qwen"}
