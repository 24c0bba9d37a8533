"""The decode step as a function of static buffers, traced and replayed the way a CUDA graph would be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from quota.core import registry
from quota.core.errors import UsageError
from quota.core.formats import SCHEMES, WEIGHT_ONLY
from quota.core.registry import HOST, Implementation, Op
from quota.models.quantize import linear_class
from quota.models.rtn import quantize_rtn
from quota.nn.kv import Packed, kv_kind
from quota.nn.linear import QuantLinear
from quota.ops import native
from quota.runtime.engine import decode
from quota.runtime.engine.chunk import Chunk
from quota.runtime.engine.decode import Buffers, chosen, describe
from tests.engine.asking import asked, engine, patches, picture, prompt, quantized, qwen_prompt, run, same
from tests.engine.device import Emulated, moved
from tests.tiny import tiny_qwen


class Traced:
    """Stands in for `cuda_graphs`: runs the step once, records every operation of a second run and replays the record.
    As in a graph, whatever a step takes from the host is a constant from then on."""

    def __init__(self) -> None:
        self.replays: list[int] = []  # per capture

    def __call__(self, step: decode.Step) -> decode.Step:
        step()
        recorded = make_fx(step)()
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> tuple[torch.Tensor, torch.Tensor]:
            self.replays[number] += 1
            return recorded()

        return replay


def captured(model, **options):
    made, traced = engine(model, **options), Traced()
    made.runner.decoder.capture = traced
    return made, traced


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "floats"])
def served(request, model):
    """(model, requests whose lengths pass page borders and powers of two)."""
    if request.param != "qwen2_5_vl":
        model = model if request.param == "llava" else quantized("llava", WEIGHT_ONLY)
        a, b = picture(1), picture(2)
        cases = [prompt(model, 9, seed=1), prompt(model, 3, a, 5, seed=2), prompt(model, 20, b, 9, a, seed=6)]
    else:
        model = quantize_rtn(tiny_qwen(key_bias=20.0), ("llm",))
        cases = [
            qwen_prompt(9, seed=1),
            qwen_prompt(3, patches(4, 4), 5, seed=2),
            qwen_prompt(9, patches(4, 6, 1), 12, seed=3),
        ]
    asks = [
        asked(f"{recipe} {i}", case, tokens=8, recipe=recipe)
        for i, case in enumerate(cases)
        for recipe in ("pruned", "compact")
    ]
    return model, [*asks, asked("drawn", cases[1], tokens=8, temperature=1.1, seed=3)]


def test_replays_have_the_bits_of_calls(served):
    model, asks = served
    plain = engine(model)
    run(plain, asks)
    made, traced = captured(model)
    run(made, asks)
    assert same(made.seen, plain.seen)
    assert sum(traced.replays) > 2 * len(traced.replays) > 0
    rows, pages = zip(*made.runner.decoder._ready, strict=True)
    assert max(rows) == 8 > len(asks) and all(n & (n - 1) == 0 for n in (*rows, *pages))


def test_replays_survive_preemption(model):
    asks = [asked(str(i), prompt(model, 3, picture(i), 5, seed=i), tokens=30) for i in range(4)]
    plain = engine(model)
    run(plain, asks)
    made, _ = captured(model, pages=110)
    run(made, asks)
    assert made.scheduler.preemptions > 0 and same(made.seen, plain.seen)


def work(layers: int, at: int, shared: int = 0) -> Chunk:
    blocks = np.arange(layers * 3, dtype=np.int32).reshape(layers, 3) + 1
    return Chunk(None, at, at + 1, 0, layers, [7], np.array([[40]]), (at,), (shared,), [blocks], (False,))


def test_buffers_say_where_rows_are(model):
    """Slots of the new token, tables up to its page; rows without work, and content that is there already, are not
    stored."""
    made = engine(model, default=None)
    made.segments = type(made.segments)((0, made.model.layers))
    buffers = Buffers(made.model, made.segments, 4, 4, 4)
    buffers.fill([work(4, 9), work(4, 11, shared=12), work(4, 3)])
    buffers.fill([work(4, 8), work(4, 7, shared=8)])  # nothing of the step before is left
    assert (
        buffers.length.tolist() == [[9, 8, 0, 0]]
        and buffers.ids.tolist() == [7, 7, 0, 0]
        and buffers.positions.tolist() == [[[40, 40, 0, 0]]]
    )
    assert buffers.slot.tolist() == [[4 * (3 + 3 * layer), -1, -1, -1] for layer in range(4)]
    assert buffers.table[1].tolist() == [[4, 5, 6, 0], [4, 5, 0, 0], [0] * 4, [0] * 4]


def test_a_device_without_an_implementation_is_refused(monkeypatch):
    monkeypatch.setattr(
        decode.ops.kv4_paged_attention,
        "implementations",
        [
            Implementation("cuda", print, lambda ctx: "the library is not built"),
            Implementation("ref", print, lambda ctx: None),
        ],
    )
    monkeypatch.setattr(decode, "OPS", ())
    monkeypatch.setattr(Packed, "page_ops", (decode.ops.kv4_paged_attention,))
    monkeypatch.setattr(QuantLinear, "OPS", ())
    with pytest.raises(
        UsageError,
        match=r"cuda:1 has no implementation of kv4_paged_attention \(cuda: the library is not built\).*use the CPU",
    ):
        chosen(torch.device("cuda:1"))
    assert "kv4_paged_attention" in describe(torch.device("cuda"))
    assert chosen(torch.device("cpu")) == {"kv4_paged_attention": "ref"}
    monkeypatch.setenv("QUOTA_IMPL", "kv4_paged_attention=ref")
    with pytest.raises(UsageError, match="QUOTA_IMPL: kv4_paged_attention=ref cannot decode on cuda:1"):
        chosen(torch.device("cuda:1"))


@pytest.mark.parametrize("scheme", SCHEMES.values())
def test_the_linears_of_a_scheme_are_among_the_ops(scheme):
    own = {op.name for op in linear_class(scheme).OPS}
    cached = {op.name for op in kv_kind(scheme.kv).page_ops}
    assert own and set(chosen(torch.device("cpu"), scheme)) == own | cached | {op.name for op in decode.OPS}


def test_what_doctor_says():
    assert describe(torch.device("cpu")).startswith("eager, pages read in place by ")


@pytest.fixture
def emulated(monkeypatch):
    """An emulated GPU on which ops run as on the CPU."""
    choose = Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, ctx=HOST: choose(op, HOST))
    monkeypatch.setattr(native, "release_pages", lambda *memory: None)
    for op in registry.ops().values():
        op.rebind()
    with Emulated() as device:
        yield device
    for op in registry.ops().values():
        op.rebind()


def test_the_engine_keeps_to_one_device(served, emulated):
    """Prefill, pruning, decoding on an emulated GPU: nothing mixes devices, the bits are the CPU's, and a decode step
    waits for nothing."""
    model, asks = served
    plain = engine(model)
    run(plain, asks)
    made, traced = engine(moved(copy.deepcopy(model))), []

    def capture(step):
        def watched():
            before = len(emulated.waited)
            out = step()
            traced.append(emulated.waited[before:])
            return out

        step()  # packs weights, reads clips
        return watched

    encode = made.model.encode_images

    def encoded(images):
        """The float tower's attention is composed of other operations here, and differs in its last bits."""
        features = encode(images)
        assert all(one.device.type == "meta" for one in features)
        return [one.to("meta") for one in plain.model.encode_images(images)]

    made.model.encode_images = encoded
    assert made.model.device.type == made.storage.keys[0].device.type == "meta"
    made.runner.decoder.capture = capture
    run(made, asks)
    assert same(made.seen, plain.seen)
    assert len(traced) > 5 and not any(traced)
