"""`quota eval`: accuracy, retention, time and bytes of one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, check_checkpoint, check_output, notes, print_json


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Quantized or float checkpoint: a folder or a hub name.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Prune visual tokens by this recipe.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Float model: adds its row, and retention against it with an interval.")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="Ask these samples (each with an `answer`) instead of the generator's questions.")] = None,
    questions: Annotated[int, typer.Option("--questions", "-n", min=1, help="How many generated questions, balanced over six tasks.")] = 600,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions answered at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 6,
    blind: Annotated[bool, typer.Option("--blind", help="Also ask without the picture: what the questions give away.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for answers (JSON lines); an interrupted run continues from them.")] = None,
    json: JsonOption = False,
) -> None:
    """Answer held-out questions and measure.

    Prints accuracy per task (exact match of the first words), the majority-class baseline, milliseconds to the first and per later token of
    single requests, bytes of the KV cache and of the weights, and visual tokens per layer. With `--model`, retention: the mean over tasks
    of accuracy / float accuracy, with a paired bootstrap 95 % interval.

    **Examples**

        quota eval demo-out/quantized --recipe demo-out/recipe.json --model quota/scenes/assets/checkpoint

        quota eval ./checkpoint --samples questions.json --json > result.json
    """
    check_checkpoint(checkpoint)
    if model is not None:
        check_checkpoint(model, "--model")
    if out is not None:
        check_output(out / "answers.jsonl")

    from quota.eval.benchmark import Settings
    from quota.eval.compare import evaluate_checkpoint
    from quota.eval.tables import evaluation_tables

    result = evaluate_checkpoint(
        checkpoint, recipe, float_model=model, samples=samples, number=questions, blind=blind, out=out,
        settings=Settings(batch=batch, max_new_tokens=max_new_tokens),
    )  # fmt: skip
    if json:
        print_json(result.model_dump(mode="json"))
        return
    from rich.console import Console

    console = Console(width=max(notes().width, 126))
    for table in evaluation_tables(result):
        console.print(table)
