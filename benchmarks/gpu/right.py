"""Sections about results: every op against the CPU, graphs, answers of the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.here import require_library
from benchmarks.gpu.options import Line, Options, facts, failure


def first(options: Options) -> Iterator[Line]:
    """Every op at small sizes against its reference on the CPU, by every implementation; every kernel of
    w4a4_linear."""
    from dataclasses import replace

    small = replace(options, small=True)
    yield from _compared(small, "cuda")
    if not options.small:
        yield from _compared(small, "triton")
    yield from _ways(options)


def ops(options: Options) -> Iterator[Line]:
    """Every op of the CUDA library against the native CPU library, whose bits tests/ops compares with the
    references'."""
    yield from _compared(options, "cuda")


def triton(options: Options) -> Iterator[Line]:
    """Every op of the Triton kernels likewise; the kernels are compiled at their first call."""
    yield from _compared(options, "triton")


def _ways(options: Options) -> Iterator[Line]:
    import torch

    from benchmarks.gpu import checks

    if options.dry:
        return
    native4 = torch.cuda.get_device_capability()[0] == 8
    for title, difference in checks.ways(options.seed, "cuda", native4):
        yield failure(f"{title}: {difference}") if difference else {"row": {"check": title}}


def _compared(options: Options, implementation: str) -> Iterator[Line]:
    import torch

    from benchmarks.gpu import checks
    from quota.core.registry import Context

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = options.poison  # type: ignore[attr-defined]
    device = "cpu" if options.dry else "cuda"
    for check in checks.all_checks(options.seed, options.small or options.dry):
        offered = next((i for i in check.op.implementations if i.name == implementation), None)
        if offered is None:
            continue
        if not options.dry and (reason := offered.supports(Context("cuda"))):
            raise RuntimeError(f"{check.op.name}: {reason}")
        against = "ref" if options.small or options.dry else "native"
        difference = checks.run(check, device, "ref" if options.dry else implementation, against)
        yield (
            failure(f"{check.title}: {difference}")
            if difference
            else {"row": {"check": f"{implementation} {check.title}"}}
        )


def hot(options: Options) -> Iterator[Line]:
    """One launch of each kernel that a 7B model spends its time in, for `counters`."""
    if options.dry:
        yield facts(would_run="the rows of section layer, once each")
        return
    from benchmarks.gpu import times

    require_library()
    for m in (1, 640):
        for _, _, run in times.layer_calls(times.FULL[0], m):
            run()


def graph(options: Options) -> Iterator[Line]:
    """A decode step's kernels captured once and replayed on other inputs and other lengths: nothing synchronises,
    nothing is baked in."""
    from benchmarks.gpu import checks

    if options.dry:
        yield facts(
            would_run=(
                "capture of quantize_act, w4a4_linear and kv4_paged_attention; three replays compared with eager calls"
            )
        )
        return
    import torch

    from quota.ops import cuda

    require_library()
    g = torch.Generator().manual_seed(options.seed)
    x, left, right, clip, _ = checks._to(checks._quantize(g, 4, 64, 64, None), "cuda")
    weight = checks._to(checks._linear(g, 4, 4096, 768)[2], "cuda")
    q, k, v, table, length, scaling = checks._to(checks._paged(g, 4, 2, 64), "cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            cuda.w4a4_linear(*cuda.quantize_act(x, left, right, clip), weight),
            cuda.kv4_paged_attention(q, k, v, table, length, scaling)[0],
        )

    step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    for i, lengths in enumerate(([5, 600, 0], [33, 1, 640], [0, 0, 16])):
        x.normal_(), q.normal_(), length.copy_(torch.tensor(lengths, dtype=torch.int32))
        captured.replay()
        same = all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))
        yield {"row": {"replay": i}} if same else failure(f"replay {i} differs from the eager calls")


def answers(options: Options) -> Iterator[Line]:
    """The embedded model, rounded to 4 bits, answers on the device what it answers on the CPU."""
    if options.dry:
        yield facts(would_run="24 questions of the embedded model on both devices, token by token")
        return
    from PIL import Image

    from quota.eval.asking import ask
    from quota.models.rtn import quantize_rtn
    from quota.runtime.load import load
    from quota.scenes import assets

    samples = json.loads((assets.SAMPLES.parent / "samples.json").read_text())["samples"][:24]
    models: dict[str, Any] = {
        device: quantize_rtn(load(assets.CHECKPOINT)).eval().to(device) for device in ("cpu", "cuda")
    }
    for sample in samples:
        picture = Image.open(assets.SAMPLES.parent / sample["image"])
        a, b = (
            ask(model, model.processor, sample["instruction"], [picture], max_new_tokens=12).text
            for model in models.values()
        )
        yield {"row": {"question": sample["id"]}} if a == b else failure(f"{sample['id']}: CPU {a!r}, GPU {b!r}")
