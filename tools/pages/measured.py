"""Markdown tables from rows of results: benchmarks/README.md, one block of docs/results.md, two of docs/serving.md, one
of SECURITY.md"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.serve.tables import attack_table, soak_table, throughput_table
from quota.report.table import byte_size, markdown_table, milliseconds

RESULTS, PAGE, DIGEST = Path("benchmarks/results"), Path("benchmarks/README.md"), Path("docs/results.md")
SERVING, SECURITY = Path("docs/serving.md"), Path("SECURITY.md")
_NOTHING = (
    "Nothing has been measured yet: `python -m benchmarks ops --out benchmarks/results/ops.jsonl`, then `python -m"
    " tools.pages`."
)
_DIGEST_SHAPES = ("llava-1.5-7b.gate_up", "llava-1.5-7b.down")
_DIGEST_ROWS = (1, 16, 173, 640)
_OPS = ("w4a4_linear", "w4a16_linear", "quantize_act", "kv4_attention", "kv4_append", "token_score")
Row = dict[str, Any]


def blocks(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """File -> block name -> text."""
    ops = rows.newest(rows.read(results / "ops.jsonl"))
    models = rows.newest(rows.read(results / "model.jsonl"))
    page = {op: op_block([r for r in ops if r["op"] == op]) for op in _OPS} | {"model": model_block(models)}
    served = {
        "throughput": throughput_block(rows.newest(rows.read(results / "serve.jsonl"))),
        "soak": soak_block(results / "soak.json"),
    }
    attacked = {"attacks": attack_block(results / "attack.json")}
    return {PAGE: page, DIGEST: {"benchmarks": digest_block(ops, models)}, SERVING: served, SECURITY: attacked}


def op_block(found: Sequence[Row]) -> str:
    """One table per machine, thread count and state of the caches."""
    if not found:
        return _NOTHING
    parts, single = [], {_line(r): r for r in found if r["ours"] and r["threads"] == 1}
    for group in _groups(found, ("cpu", "threads", "weights")):
        parts += [_where(group), "", _ops_table(group, single)]
    return "\n".join(parts).rstrip()


def digest_block(ops: Sequence[Row], models: Sequence[Row]) -> str:
    """The few rows that say most: two projections of LLaVA-1.5-7B, one thread; the whole model."""
    best = {cpu: _best([r for r in ops if r["cpu"] == cpu]) for cpu in dict.fromkeys(r["cpu"] for r in ops)}
    linear = [
        r
        for r in ops
        if r["op"] == "w4a4_linear"
        and r["shape"] in _DIGEST_SHAPES
        and r["size"]["m"] in _DIGEST_ROWS
        and r["threads"] == 1
        and r["weights"] == "resident"
        and (not r["ours"] or r["isa"] == best[r["cpu"]])
    ]
    text = op_block(linear)
    return text if not models else f"{text}\n\n{model_block([m for m in models if m['threads'] == 1] or models)}"


def _best(found: Sequence[Row]) -> str | None:
    """The instruction set of ours with the most operations per second."""
    own = [r for r in found if r["ours"] and r["op"] == "w4a4_linear"]
    return max(own, key=lambda r: r["gops"])["isa"] if own else None


def _groups(found: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in found:
        groups.setdefault(tuple(r[name] for name in names), []).append(r)
    return list(groups.values())


def _where(group: Sequence[Row]) -> str:
    r, loads = group[0], [g["load"] for g in group]
    commits = ", ".join(dict.fromkeys(f"{g['commit']}{' (changed)' if g['dirty'] else ''}" for g in group))
    versions = ", ".join(
        f"{name} {version}" for name, version in r["versions"].items() if name not in ("python", "transformers")
    )
    caches = ", caches emptied before every call" if r["weights"] == "cold" else ""
    judged = "CPU time" if r["threads"] == 1 and r["op"] != "serve" else "wall time"
    return (
        f"{r['cpu']} ({', '.join(r['features'])}), {r['threads']} thread{'s' * (r['threads'] > 1)}, {judged}{caches}; "
        f"load average {min(loads):g} to {max(loads):g}; {versions}; commit {commits}."
    )


def _line(r: Row) -> str:
    """What a row of ours measures, whatever the threads."""
    return json.dumps(
        [r[name] for name in ("op", "shape", "size", "weights", "cpu", "implementation", "isa")], sort_keys=True
    )


def _ops_table(group: Sequence[Row], single: Mapping[str, Row]) -> str:
    """single: `_line` -> the row on one thread; with more, a column says how many times as fast they are, by wall
    time."""
    own = [r for r in group if r["ours"]]
    scaling = [f"{single[_line(r)]['wall_ms'][0] / r['wall_ms'][0]:.2f}" if _line(r) in single else "" for r in own]
    scales = bool(own) and own[0]["threads"] > 1 and any(scaling)
    peers = list(dict.fromkeys(name for r in own for name in r["ratios"]))
    keys = list(own[0]["size"]) if own else []
    lines = []
    for r, faster in zip(own, scaling, strict=True):
        cells = [
            r["shape"],
            *(r["size"][k] for k in keys),
            r["implementation"],
            r["isa"],
            milliseconds(_judged(r)),
            f"{r['gops']:.0f}",
        ]
        cells.append(f"{r['percent_of_roofline']:.0f} % {r['bound']}" if "percent_of_roofline" in r else "")
        lines.append([*cells, *([faster] if scales else []), *(_ratio(r["ratios"].get(p)) for p in peers)])
    head = [
        "shape",
        *(k.upper() for k in keys),
        "ours",
        "isa",
        "time",
        "GOPS",
        "of roofline",
        *(["× one thread"] if scales else []),
    ]
    return markdown_table([*head, *(f"× {p}" for p in peers)], lines)


def _judged(r: Row) -> float:
    return r["cpu_ms" if r["threads"] == 1 else "wall_ms"][0]


def _ratio(values: list[float] | None) -> str:
    """Peer's time / ours; a loss is said in words."""
    if values is None:
        return ""
    return f"{values[0]:.2f}" if values[0] >= 1 else f"{values[0]:.2f} **loss**"


def model_block(found: Sequence[Row]) -> str:
    """One table per machine and thread count."""
    if not found:
        return (
            "No model has been measured yet: `python -m benchmarks model --arch llava-1.5-7b --synthetic`, then `python"
            " -m tools.pages`."
        )
    parts = []
    for group in _groups(found, ("cpu", "threads")):
        head = [
            "model",
            "implementation",
            "layers",
            "TTFT",
            "TTFT, CPU time",
            "decode",
            "decode, CPU time",
            "peak RSS",
            "not mapped",
            "KV per layer",
            "disk",
        ]
        parts += [_where(group), "", markdown_table(head, [_model_cells(r) for r in group])]
    return "\n".join(parts).rstrip()


def _model_cells(r: Row) -> list[str]:
    measured = r.get("layers_measured")
    layers = f"{r['layers']}" if not measured else f"{r['layers']}, extrapolated from {measured[0]} and {measured[1]}"
    return [
        r["shape"],
        r["implementation"],
        layers,
        milliseconds(r["ttft_ms"]),
        milliseconds(r["ttft_cpu_ms"]),
        milliseconds(r["decode_ms"]),
        milliseconds(r["decode_cpu_ms"]),
        byte_size(r["peak_rss_bytes"]),
        byte_size(r["anonymous_bytes"]),
        byte_size(r["kv_bytes_per_layer"]),
        byte_size(r["checkpoint_bytes"]),
    ]


def throughput_block(found: Sequence[Row]) -> str:
    """One table per machine, thread count and model."""
    if not found:
        return "Nothing has been measured yet: `python -m benchmarks serve throughput`, then `python -m tools.pages`."
    parts = []
    for group in _groups(found, ("cpu", "threads", "shape")):
        parts += [f"{group[0]['shape']}: {_where(group)}", "", throughput_table(group)]
    return "\n".join(parts).rstrip()


def soak_block(report: Path) -> str:
    """The last soak that was kept."""
    if not report.exists():
        return "No soak is kept yet: `python -m benchmarks serve soak`, then `python -m tools.pages`."
    found = json.loads(report.read_text(encoding="utf-8"))
    return (
        f"{found['cpu']}, {found['threads']} threads, commit {found['commit']},"
        f" {found['date'][:10]}.\n\n{soak_table(found)}".rstrip()
    )


def attack_block(report: Path) -> str:
    """The last round of attacks that was kept."""
    if not report.exists():
        return "No attacks are kept yet: `python -m benchmarks serve attack`, then `python -m tools.pages`."
    found = json.loads(report.read_text(encoding="utf-8"))
    return (
        f"{found['cpu']}, {found['threads']} threads, commit {found['commit']},"
        f" {found['date'][:10]}.\n\n{attack_table(found)}".rstrip()
    )
