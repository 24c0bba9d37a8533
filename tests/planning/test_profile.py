"""The layer profile against direct computations on a tiny LLaVA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quota.calib.samples import Sample, Samples, encode
from quota.core.errors import CheckpointError, SampleError
from quota.planning.profile import concentration, profile, redundancy
from quota.scenes.model import build_config, build_model, build_processor
from tests.calib.test_samples import picture


class Rounded(nn.Module):
    """Stands for a quantized linear: its input and weight lose precision."""

    def __init__(self, linear: nn.Linear, steps: float) -> None:
        super().__init__()
        self.linear, self.steps = linear, steps

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / self.steps
        return self.linear((x / scale).round() * scale)


def rounded(model: nn.Module, steps: float) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj, steps)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(build_config(56, width=64, layers=4)).eval()


@pytest.fixture(scope="module")
def processor() -> object:
    return build_processor(56)


@pytest.fixture(scope="module")
def samples() -> Samples:
    texts = ("what color is the star ?", "describe the picture .", "how many red objects are there ?")
    return Samples.of([Sample(f"s{i}", text, picture(i, (70, 60))) for i, text in enumerate(texts)])


def test_concentration_and_redundancy_by_hand() -> None:
    assert concentration(torch.full((40,), 0.3)) == pytest.approx(0.25)
    assert concentration(torch.eye(40)[3]) == pytest.approx(1.0)
    assert concentration(torch.ones(4)) == pytest.approx(1.0)
    assert redundancy(torch.ones(5, 8)) == pytest.approx(1.0)
    assert redundancy(torch.eye(6)) == pytest.approx(0.0)
    assert redundancy(torch.ones(1, 8)) == 1.0


def test_a_model_against_itself_is_not_sensitive(model: nn.Module, processor: object, samples: Samples) -> None:
    seen: list[tuple[int, int]] = []
    p = profile(model, model, processor, samples, lambda done, total: seen.append((done, total)))
    assert p.sensitivity == (0.0,) * 4
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert p.model.visual_tokens == 16
    assert p.model.layers == 4
    assert p.model.text_tokens == round(sorted(int((encode(processor, s)["input_ids"] != 4).sum()) for s in samples)[1])
    assert p.calibration_fingerprint == samples.fingerprint
    assert all(
        a <= b <= c for a, b, c in zip(p.concentration_q25, p.concentration_median, p.concentration_q75, strict=True)
    )


def test_matches_direct_computation(model: nn.Module, processor: object, samples: Samples) -> None:
    """Attention from the eager implementation's own matrices, hidden states from transformers' own outputs."""
    quantized = rounded(model, 7)
    one = samples.first(1)
    p = profile(model, quantized, processor, one)
    inputs = encode(processor, one[0])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        exact = eager(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
        low = quantized(**inputs, output_hidden_states=True, use_cache=False)
    visual = (inputs["input_ids"][0] == 4).nonzero()[:, 0]
    for layer in range(4):
        rows = exact.attentions[layer][0][:, int(visual[-1]) + 1 :, visual]
        share = rows.mean((0, 1)) / rows.mean((0, 1)).sum()
        assert p.concentration_median[layer] == pytest.approx(float(share.sort().values[-10:].sum()), rel=1e-4)
        x, x_q = exact.hidden_states[layer], low.hidden_states[layer]
        assert p.sensitivity[layer] == pytest.approx(float((x - x_q).norm() / x.norm()), rel=1e-3, abs=1e-6)
        tokens = nn.functional.normalize(x[0, visual], dim=-1)
        pairs = [float(tokens[i] @ tokens[j]) for i in range(16) for j in range(i)]
        assert p.redundancy_median[layer] == pytest.approx(sorted(pairs)[(len(pairs) - 1) // 2], abs=1e-5)


def test_coarser_is_more_sensitive_and_runs_are_equal(model: nn.Module, processor: object, samples: Samples) -> None:
    fine, coarse = (
        profile(model, rounded(model, 127), processor, samples),
        profile(model, rounded(model, 2), processor, samples),
    )
    assert all(a < b for a, b in zip(fine.sensitivity[1:], coarse.sensitivity[1:], strict=True))
    assert fine.dumps() == profile(model, rounded(model, 127), processor, samples).dumps()


def test_hooks_are_removed_even_after_an_error(model: nn.Module, processor: object, samples: Samples) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, model, processor, samples, stop)
    broken = copy.deepcopy(model)
    broken.model.language_model.layers[2].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        profile(model, broken, processor, samples)
    for m in (model, broken):
        assert not any(module._forward_pre_hooks for module in m.modules())


def test_text_only_samples_count_for_sensitivity_only(model: nn.Module, processor: object, samples: Samples) -> None:
    text = Sample("t", "is there red star in the picture ?")
    mixed = Samples.of([*samples, text])
    assert (
        profile(model, model, processor, mixed).concentration_median
        == profile(model, model, processor, samples).concentration_median
    )
    with pytest.raises(SampleError, match="at least one with an image"):
        profile(model, model, processor, Samples.of([text]))


def test_another_model_is_refused(model: nn.Module, processor: object, samples: Samples) -> None:
    other = build_model(build_config(56, width=64, layers=4), seed=1)
    with pytest.raises(CheckpointError, match="model: the quantized checkpoint was made from"):
        profile(model, other, processor, samples)


def test_the_number_of_threads_cannot_show(model: nn.Module, processor: object, samples: Samples) -> None:
    before, found, inside = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                profile(
                    model, rounded(model, 7), processor, samples, lambda *_: inside.append(torch.get_num_threads())
                ).dumps()
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] and set(inside) == {1}
