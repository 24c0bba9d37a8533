"""What a reader of an evaluation must not overlook, one sentence each."""

from __future__ import annotations

from quota.eval.paired import resolution_sentence
from quota.eval.results import Evaluation


def left_out(retention_by_task: dict[str, float | None]) -> list[str]:
    """Tasks in which the float row gets nothing right: no percentage of zero, so the retention does not cover them."""
    return [task for task, value in retention_by_task.items() if value is None]


def below_majority(accuracy_by_task: dict[str, float], majority_by_task: dict[str, float]) -> list[str]:
    """Tasks in which always giving the most frequent answer is right more often."""
    return [task for task, accuracy in accuracy_by_task.items() if accuracy < majority_by_task[task]]


def left_out_sentence(tasks: list[str], of: int) -> str:
    """`tasks`: those left out of `of`, at least one."""
    if len(tasks) == of:
        return "The float row gets nothing right in any task: there is no retention."
    return (
        f"Retention leaves out {', '.join(tasks)}, where the float row gets nothing right: it covers {of - len(tasks)}"
        f" of {of} tasks."
    )


def below_sentences(accuracy_by_row: dict[str, dict[str, float]], majority_by_task: dict[str, float]) -> list[str]:
    """One for each row that knows no more than a constant answer would in some task."""
    found = {row: below_majority(accuracies, majority_by_task) for row, accuracies in accuracy_by_row.items()}
    of = len(majority_by_task)
    return [
        f"{row} is below the most frequent answer in {', '.join(tasks)} ({len(tasks)} of {of} tasks)."
        for row, tasks in found.items()
        if tasks
    ]


def remarks(result: Evaluation) -> list[str]:
    """Tasks that no retention covers, rows below the most frequent answer, and the smallest difference resolved."""
    float_row = next((row.retention_by_task for row in result.rows if row.retention_by_task), {})
    missing = result.retention_leaves_out if result.retention_leaves_out is not None else left_out(float_row)
    sentence = [left_out_sentence(missing, len(result.questions_by_task))] if missing else []
    below = below_sentences({r.name: r.accuracy_by_task for r in result.rows}, result.majority_accuracy_by_task)
    return [*sentence, *below, *resolution_sentence(result.comparisons)]
