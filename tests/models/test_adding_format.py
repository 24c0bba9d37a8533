"""The scheme of docs/adding.md, run: two rows are all that three-bit weights need."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quota.calib import run as calibration
from quota.calib.settings import METHODS, Settings
from quota.core import formats
from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT, MODULES, SCHEMES, Scheme
from quota.models import model_fingerprint
from quota.models.quantize import model_scheme, quantized_linears, weight_bytes
from quota.models.rtn import quantize_rtn
from quota.quant.pack import unpack_int4
from quota.runtime import load
from tests.calib.calibration import float_folder, picture_samples
from tests.engine.asking import asked, engine, generated, prompt, run, tokens
from tests.engine.asking import picture as image
from tests.tiny import llava_inputs, tiny_llava

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.fixture
def scheme(monkeypatch) -> Scheme:
    """The page's scheme, where the page says it goes."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    made = dict(vars(formats))
    exec(compile(next(block for block in blocks if "Scheme(" in block), str(PAGE), "exec"), made)
    row = made["W3A4KV4"]
    monkeypatch.setitem(SCHEMES, row.name, row)
    return row


@pytest.fixture
def folder(scheme, tmp_path) -> Path:
    model = quantize_rtn(tiny_llava(), scheme=scheme)
    save_checkpoint(model, tmp_path / "out", Manifest(scheme, MODULES, model_fingerprint(model)))
    return tmp_path / "out"


def test_without_its_row_the_checkpoint_is_refused(folder, monkeypatch):
    monkeypatch.delitem(SCHEMES, "w3a4kv4")
    with pytest.raises(CheckpointError, match=r"regime: this quota reads w4a4kv4, w4a16.*, got 'w3a4kv4'"):
        load(folder)


@torch.no_grad()
def test_rounded_saved_loaded_and_generated(scheme, folder):
    made, model, other = quantize_rtn(tiny_llava(), scheme=scheme), load(folder), quantize_rtn(tiny_llava())
    assert model_scheme(model) is scheme and model.quota_manifest.scheme is scheme
    codes = torch.cat([unpack_int4(x.w_q, x.in_features).flatten() for x in quantized_linears(model).values()])
    assert (int(codes.min()), int(codes.max())) == (-3, 3) and weight_bytes(model) == weight_bytes(other)
    inputs, generation = llava_inputs(model), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    logits = model(**inputs).logits
    assert torch.equal(made(**inputs).logits, logits) and not torch.equal(other(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **generation), made.generate(**inputs, **generation))


@pytest.mark.parametrize("recipe", [None, "pruned"])
def test_served_as_generated_and_bitwise_as_alone(folder, recipe):
    model = load(folder)
    prompts = {"a": prompt(model, 3, image(1), 2), "b": prompt(model, 5, seed=2), "c": prompt(model, image(2), 7)}
    requests = {name: asked(name, made, recipe=recipe) for name, made in prompts.items()}
    together = engine(model)
    outputs = run(together, requests.values())
    for name, request in requests.items():
        alone = engine(model)
        run(alone, [request])
        assert all((x == y).all() for x, y in zip(alone.seen[name], together.seen[name], strict=True))
        if recipe is None:
            assert tokens(outputs[name]) == generated(model, prompts[name])


def test_calibrated(scheme, monkeypatch, tmp_path):
    row = replace(scheme, methods=("flatquant3",))
    monkeypatch.setitem(SCHEMES, row.name, row)
    monkeypatch.setitem(METHODS, "flatquant3", METHODS["flatquant"])
    float_folder(tmp_path / "float")
    reports = {
        method: calibration.calibrate(
            tmp_path / "float",
            picture_samples(3),
            out=tmp_path / method,
            progress=False,
            settings=Settings(method=method, modules=("llm",), steps=2),
        )
        for method in ("flatquant3", "flatquant")
    }
    assert reports["flatquant3"].regime == row.name and reports["flatquant"].regime == DEFAULT.name
    coarse, fine = (sum(block["mse"] for block in reports[method].blocks) for method in reports)
    assert fine < coarse < float("inf")
    model = load(tmp_path / "flatquant3")
    assert model_scheme(model) is row
    codes = torch.cat([unpack_int4(x.w_q, x.in_features).flatten() for x in quantized_linears(model).values()])
    assert (int(codes.min()), int(codes.max())) == (-4, 3)
