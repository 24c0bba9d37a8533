"""The `quota` command: verbs are thin, each imports what it needs when it runs, so `quota --help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from quota.cli import calibrate, demo, doctor, evaluate, export, importing, recipe, run, samples, serve, study
from quota.cli.shell import ErrorReportingGroup

app = typer.Typer(
    name="quota",
    cls=ErrorReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from quota.core.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Joint quantization and visual-token pruning of vision-language models.

    A float checkpoint (LLaVA, Qwen-VL and others) becomes a W4A4KV4 checkpoint (`calibrate`) and a recipe (`recipe`)
    that says how many visual tokens each layer keeps; both together answer questions (`run`, `eval`).

    **Start here:** `quota demo` does all of it on an embedded model. Every verb explains itself: `quota VERB --help`.
    """


app.command("doctor", rich_help_panel="Look")(doctor.doctor)
app.command("calibrate", rich_help_panel="Make")(calibrate.calibrate)
app.command("export", rich_help_panel="Make")(export.export)
app.command("import", rich_help_panel="Make")(importing.import_)
app.add_typer(samples.app, name="samples", rich_help_panel="Make")
app.add_typer(recipe.app, name="recipe", rich_help_panel="Make")
app.command("run", rich_help_panel="Use")(run.run)
app.command("serve", rich_help_panel="Use")(serve.serve)
app.command("eval", rich_help_panel="Use")(evaluate.evaluate)
app.command("study", rich_help_panel="Look")(study.study)
app.command("demo", rich_help_panel="Look")(demo.demo)

if __name__ == "__main__":
    app()
