"""An `Evaluation` as rich tables."""

from __future__ import annotations

from rich.table import Table

from quota.eval.results import Evaluation, Row


def evaluation_tables(result: Evaluation) -> list[Table]:
    """Accuracy per task with baselines; retention and cost; paired differences (when there are any)."""
    return [accuracy_table(result), cost_table(result), *([comparison_table(result)] if result.comparisons else [])]


def accuracy_table(result: Evaluation) -> Table:
    tasks = list(result.questions_by_task)
    table = Table(title=f"Accuracy, percent, over {result.questions} held-out questions")
    table.add_column("row", no_wrap=True)
    for task in tasks:
        table.add_column(f"{task}\n({result.questions_by_task[task]})", justify="right")
    table.add_column("mean", justify="right")
    for row in result.rows:
        table.add_row(row.name, *(_percent(row.accuracy_by_task[t]) for t in tasks), _percent(row.accuracy))
    table.add_section()
    baselines = {
        "most frequent answer": result.majority_accuracy_by_task,
        "blind (no image)": result.blind_accuracy_by_task,
    }
    for name, values in baselines.items():
        if values is not None:
            table.add_row(
                name, *(_percent(values[t]) for t in tasks), _percent(sum(values.values()) / len(values)), style="dim"
            )
    return table


def cost_table(result: Evaluation) -> Table:
    table = Table(title="Retention (percent of float, 95 % paired bootstrap interval) and cost of one request")
    table.add_column("row", no_wrap=True)
    on_gpu = any(row.gpu_peak_bytes is not None for row in result.rows)
    gpu = ("GPU peak MB", "GPU W") if on_gpu else ()
    for name in ("retention", "prefill ms", "decode ms", "KV kB", "weights MB", "visual tokens,\nlayer mean", *gpu):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        used = (
            (f"{(row.gpu_peak_bytes or 0) / 1e6:.1f}", "-" if row.gpu_power_w is None else f"{row.gpu_power_w:.0f}")
            if on_gpu
            else ()
        )
        table.add_row(
            row.name,
            _retention(row),
            f"{row.prefill_ms:.1f}",
            f"{row.decode_ms:.2f}",
            f"{row.kv_bytes / 1e3:.0f} {row.kv_dtype}",
            f"{row.checkpoint_bytes / 1e6:.2f}",
            f"{row.average_visual_tokens:.1f}",
            *used,
        )
    return table


def comparison_table(result: Evaluation) -> Table:
    table = Table(title="Paired differences of retention, percentage points")
    for name in ("row", "against", "difference", "95 % interval", "for all at once", "verdict"):
        table.add_column(name, no_wrap=True)
    for c in result.comparisons:
        table.add_row(
            c.row,
            c.against,
            f"{c.difference.value:+.2f}",
            f"{c.difference.low:+.2f} to {c.difference.high:+.2f}",
            "-" if c.corrected is None else f"{c.corrected.low:+.2f} to {c.corrected.high:+.2f}",
            c.verdict,
        )
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _retention(row: Row) -> str:
    r = row.retention
    return f"{r.value:.1f} ({r.low:.1f}-{r.high:.1f})" if r else "-"
