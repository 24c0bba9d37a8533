"""Sections about time: linears, attention, every op of a layer, whole models."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.here import require_library
from benchmarks.gpu.options import Line, Options, facts, failure


def _rows(options: Options, plan: list[str], rows: Iterator[dict]) -> Iterator[Line]:
    if options.dry:
        yield facts(would_time=plan)
        return
    require_library()
    for row in rows:
        yield {"row": row}
        if "failed" in row and row["implementation"].startswith("quota"):
            yield failure(f"{row['case']}, {row['implementation']}: {row['failed']}")


def _linears(options: Options, rows: tuple[int, ...], peers: bool) -> Iterator[Line]:
    from benchmarks.gpu import times

    cases = [(shape, m) for m in rows for model in times.FULL for shape in model.linears()]
    found = ({"case": f"{s.name} M={m}", "m": m, **row} for s, m in cases for row in times.linear_rows(s, m, peers))
    yield from _rows(options, [f"{s.name} M={m}" for s, m in cases], found)


def linears(options: Options) -> Iterator[Line]:
    """w4a4_linear beside cuBLAS bf16 (whose output is bf16, half the bytes of ours) on projections of 7B models."""
    from benchmarks.gpu import times

    yield from _linears(options, times.FEW_ROWS, False)


def peers(options: Options) -> Iterator[Line]:
    """The same at more sizes, beside int8, FP8 and our Triton kernels."""
    from benchmarks.gpu import times

    yield from _linears(options, times.ROWS, True)


def humming(options: Options) -> Iterator[Line]:
    """w4a4_linear beside humming's W4A8, where humming-kernels is installed; it compiles each size."""
    from benchmarks.gpu import times
    from benchmarks.gpu.peers import why_not_humming

    if reason := why_not_humming():
        yield facts(absent=reason)
        return
    cases = [(shape, m) for model in times.FULL for shape in model.linears() for m in times.FEW_ROWS]
    found = ({"case": f"{s.name} M={m}", "m": m, **row} for s, m in cases for row in times.humming_rows(s, m))
    yield from _rows(options, [f"{s.name} M={m}" for s, m in cases], found)


def attention(options: Options) -> Iterator[Line]:
    """Decode attention, contiguous and in pages, and a prefill's, beside SDPA and flash-attn in bf16."""
    yield from _attention(options, False)


def contexts(options: Options) -> Iterator[Line]:
    """The same at more batches and lengths."""
    yield from _attention(options, True)


def _attention(options: Options, more: bool) -> Iterator[Line]:
    from benchmarks.gpu import times
    from benchmarks.shapes import ATTENTIONS

    cases = [
        (a, b, s)
        for b, s in (times.MORE_CONTEXTS if more else times.CONTEXTS)
        for a in ATTENTIONS
        if a.name in {m.name for m in times.FULL}
    ]
    found = ({"case": f"{a.name} B={b} S={s}", **row} for a, b, s in cases for row in times.attention_rows(a, b, s))
    yield from _rows(options, [f"{a.name} B={b} S={s}" for a, b, s in cases], found)


def layer(options: Options) -> Iterator[Line]:
    """Every op that the engine calls, as it calls it, at the sizes of 7B models; the share of quantizing beside the
    linears follows from these."""
    from benchmarks.gpu import times

    cases = [(model, m) for m in times.FEW_ROWS for model in times.FULL]
    yield from _rows(
        options,
        [f"{model.name} M={m}" for model, m in cases],
        (row for model, m in cases for row in times.layer_rows(model, m)),
    )


def _models(options: Options, archs: tuple[str, ...], repeats: int) -> Iterator[Line]:
    from benchmarks.gpu import models

    sizes = models.Sizes(repeats=repeats)
    if options.dry:
        names = [f"{name}{kept}" for name in ("quota", "quota, engine") for kept in ("", f", keep {models.KEEP:g}")] + [
            "transformers bf16"
        ]
        yield facts(
            would_time=[f"{arch} B={batch}: {name}" for arch in archs for batch in sizes.batches for name in names]
        )
        return
    require_library()
    found = []
    for arch in archs:
        for row in models.rows(arch, sizes):
            found.append(row)
            yield {"row": row}
    yield facts(table=models.table(found))
    yield from map(failure, models.failures(found))


def models(options: Options) -> Iterator[Line]:
    """LLaVA-1.5-7B with random weights: first token, tokens per second, memory and power, beside transformers in
    bf16."""
    yield from _models(options, ("llava-1.5-7b",), 2)


def qwen(options: Options) -> Iterator[Line]:
    """Qwen2.5-VL-7B likewise."""
    yield from _models(options, ("qwen2.5-vl-7b",), 2)
