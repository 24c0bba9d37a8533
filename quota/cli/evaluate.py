"""`quota eval`: accuracy, retention, time and bytes of one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import (
    DeviceOption,
    DtypeOption,
    FloatType,
    JsonOption,
    check_checkpoint,
    check_output_folder,
    notes,
    print_json,
)
from quota.core.errors import UsageError


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Quantized or float checkpoint: a folder or a hub name.")
    ],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="Prune by this recipe; repeat for a row each, `none` is an unpruned row."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Float model: adds its row, and retention against it with an interval."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks of lmms-eval, by name and comma, instead of generated questions."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder with local copies of the tasks' data sets, laid out as on the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions of each task.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = FloatType.float32,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples", help="Ask these samples (each with an `answer`) instead of the generator's questions."
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions", "-n", min=1, help="How many generated questions, balanced over tasks; default 600."
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help="Questions taken at once; the engine makes batches of its own of them."),
    ] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens; default 6. Tasks have their own."),
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Also ask without the image: what the questions give away.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for answers (JSON lines) and eval.json; an interrupted run continues from it."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Answer held-out questions, or benchmarks by name, and measure.

    Prints accuracy per task (exact match of the first words), the majority-class baseline, milliseconds to the first
    and per later token of single requests, bytes of the KV cache and of the weights, and visual tokens per layer. With
    `--model`, retention: the mean over tasks of accuracy / float accuracy, with a paired bootstrap 95 % interval. On a
    GPU also peak memory and average power of the timed requests.

    With `--tasks`, lmms-eval asks and scores (`gqa,mme,pope,seedbench,scienceqa_img,mmbench_en_dev_static`, the
    embedded `quota_scenes` and
    `quota_pages`, or any other task about images); `--out` then also gets eval.md and eval.png.

    Rows of one checkpoint are answered together, quantized ones through the serving engine; each question gets the
    answer it gets alone. Without `--tasks` the checkpoints of all rows are in memory together, because single
    requests are timed in turns. A samples file (`--samples`) is described in `quota calibrate --help`; evaluation
    needs an `answer` in every sample and reports accuracy by `task`.

    **Examples**

        quota eval demo-out/quantized --recipe demo-out/recipe.json --model quota/scenes/assets/checkpoint

        quota eval demo-out/quantized --recipe none --recipe demo-out/recipe.json --recipe demo-out/uniform.json

        quota eval ./checkpoint --samples questions.json --json > result.json

        quota eval demo-out/quantized --recipe none --recipe demo-out/recipe.json --model quota/scenes/assets/checkpoint
        --tasks quota_scenes --out eval-out
    """
    check_checkpoint(checkpoint)
    repeated = sorted({name for name in recipe or [] if (recipe or []).count(name) > 1})
    if repeated:
        raise UsageError(f"--recipe: {', '.join(repeated)} is given twice")
    if model is not None:
        check_checkpoint(model, "--model")
    if out is not None:
        check_output_folder(out)
    if tasks is not None:
        for name, given in (
            ("--samples", samples),
            ("--questions", questions),
            ("--max-new-tokens", max_new_tokens),
            ("--blind", blind or None),
        ):
            if given is not None:
                raise UsageError(
                    f"{name}: not with --tasks, whose questions and answers are the tasks' own; --limit asks fewer"
                )
        _by_lmms_eval(
            checkpoint, recipe or ["none"], model, (tasks, data, limit), (device, dtype.value), batch, out, json
        )
        return
    for name, unused in (("--data", data), ("--limit", limit)):
        if unused is not None:
            raise UsageError(f"{name}: only with --tasks")
    from quota.eval.benchmark import Settings
    from quota.eval.compare import EvalRequest, evaluate_checkpoint
    from quota.eval.remarks import remarks
    from quota.eval.tables import evaluation_tables
    from quota.runtime.load import Placement

    result = evaluate_checkpoint(
        checkpoint,
        [None if name == "none" else Path(name) for name in recipe or ["none"]],
        float_model=model,
        asked=EvalRequest(samples, questions or 600, blind, out),
        settings=Settings(batch=batch, max_new_tokens=max_new_tokens or 6, place=Placement(device, dtype.value)),
    )
    if json:
        print_json(result.model_dump(mode="json"))
        return
    from rich.console import Console

    console = Console(width=max(notes().width, 126))
    for table in evaluation_tables(result):
        console.print(table)
    for remark in remarks(result):
        console.print(remark, markup=False, highlight=False)


def _by_lmms_eval(
    checkpoint: str,
    recipes: list[str],
    model: str | None,
    asked: tuple[str, Path | None, int | None],
    place: tuple[str, str],
    batch: int,
    out: Path | None,
    json: bool,
) -> None:
    """The rows of `--tasks`; asked: (tasks, data, limit), place: (device, dtype)."""
    tasks, data, limit = asked
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UsageError("--tasks: expected names joined by commas, got none")
    if data is not None and not data.is_dir():
        raise UsageError(
            f"--data: no folder {data}; expected one that holds data sets as the hub names them, such as"
            " lmms-lab-encoder/POPE"
        )

    import tempfile

    from quota.lmms.run import Plan, check_installed

    check_installed()
    from quota.eval.compare import row_names
    from quota.lmms.report import FLOAT, Configuration, EvalSettings, evaluate_tasks, task_tables, write_report

    paths = [None if name == "none" else Path(name) for name in recipes]
    rows = [Configuration(FLOAT, model)] if model else []
    rows += [
        Configuration(name, checkpoint, path)
        for name, path in zip(row_names(checkpoint, paths, model), paths, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (out or Path(scratch)).resolve()
        plan = Plan(names, folder / "lmms-eval", data and data.resolve(), limit)
        report = evaluate_tasks(rows, EvalSettings(plan, folder / "answers", batch, *place))
        if out is not None:
            write_report(report, folder)
    if json:
        print_json(report.model_dump(mode="json"))
        return
    from rich.console import Console

    console = Console(width=max(notes().width, 126))
    for table in task_tables(report):
        console.print(table)
