"""The six stages of `quota demo`."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quota.allocate.explain import explain, explain_text
from quota.calib.stream import FloatSource
from quota.core.files import atomic_write_text
from quota.core.folders import resolve_folder
from quota.core.formats import DEFAULT
from quota.demo.embedded import held_out, reference_of, sources, tour
from quota.demo.report import Environment, ModelFacts, Report, SideBySide, Stage
from quota.eval.asking import ask
from quota.eval.benchmark import Answered, Settings, summarise, weight_bytes
from quota.eval.cache import link
from quota.eval.compare import TIMED_QUESTIONS
from quota.eval.generation import under
from quota.eval.machine import cpu, describe_native
from quota.eval.pipeline import ROUNDED, Entry, Options, Pipeline
from quota.eval.remarks import remarks
from quota.eval.results import Evaluation
from quota.eval.score import is_right
from quota.eval.tables import evaluation_tables

COMPARISONS = (
    ("collaborative", "quantize-then-prune"),
    ("collaborative", "prune-then-quantize"),
    ("collaborative", "quant-only"),
)
FILES = {
    "profile_plot": "profile.png",
    "recipe_plot": "recipe.png",
    "quantized": "quantized",
    "recipe": "recipe.json",
    "uniform_recipe": "uniform.json",
}
ROWS = (
    "float",
    "quant-only",
    "prune-only",
    "quantize-then-prune",
    "prune-then-quantize",
    "collaborative",
    "quant-rtn",
)
SIDE_BY_SIDE = ("float", "quant-only", "collaborative")


@dataclass(frozen=True)
class DemoSettings:
    """What `quota demo` was asked for. family: of the embedded model; None where `model` names another one, or for the
    default."""

    out: Path = Path("demo-out")
    family: str | None = None
    keep: float = 0.3
    questions: int = 600
    model: str | None = None
    samples: Path | None = None
    steps: int | None = None
    seed: int = 0
    quiet: bool = False


class Demo(Pipeline):
    """One run: the settings and the pipeline. The embedded models are small, so all that are loaded stay."""

    def __init__(self, settings: DemoSettings) -> None:
        s = self.settings = settings
        checkpoint, samples = sources(s.family, s.model, s.samples)
        self.config = FloatSource(checkpoint).config
        options = Options(
            s.out, reference_of(self.config), steps=s.steps, seed=s.seed, in_memory=len(ROWS), quiet=s.quiet
        )
        super().__init__(checkpoint, samples, options)
        self.console = Console(stderr=s.quiet, width=max(Console().width, 126))

    def title(self, number: int, text: str) -> None:
        self.console.print(f"\n[bold]{number}/6  {text}[/bold]")

    # -- stages --------------------------------------------------------------------------------------------------------

    def facts(self) -> ModelFacts:
        """Stage 1: the float checkpoint and its samples."""
        from quota.models import find_family
        from quota.planning.facts import measured_facts

        self.title(1, "float checkpoint and calibration samples")
        model, processor = self.loaded(self.float_checkpoint)
        measured = measured_facts(model, processor, self.samples)
        facts = ModelFacts(
            checkpoint=self.settings.model or "embedded",
            family=find_family(model).name,
            fingerprint=measured.fingerprint,
            parameters=sum(p.numel() for p in model.parameters()),
            layers=measured.layers,
            visual_tokens=measured.visual_tokens,
            image_size_px=getattr(self.config.vision_config, "image_size", None),
            float_bytes=weight_bytes(resolve_folder(self.float_checkpoint)),
            samples=len(self.samples),
            samples_fingerprint=self.samples.fingerprint,
        )
        self.console.print(
            f"{type(model).__name__}: {facts.parameters / 1e6:.2f} M parameters, {facts.layers} decoder layers,"
            f" {facts.visual_tokens} visual tokens"
            f" {'of the median image' if facts.image_size_px is None else 'per image'}; {facts.samples} samples"
        )
        return facts

    def side_by_side(self, entries: dict[str, Entry]) -> tuple[list[SideBySide], dict[str, str]]:
        """Stage 4: the tour's questions in three rows; its images, and the tokens kept for the first question about
        each."""
        from quota.report.overlay import save_overlay

        out, results = self.settings.out, list[SideBySide]()
        files: dict[str, str] = {}
        for name, asked in tour(self.config).items():
            image = asked[0].open_image() if asked[0].open_image is not None else None
            overlay = None if image is None else "overlay" if name == "image" else f"overlay-{name}"
            if image is not None:
                files[name] = f"{name}.png"
                image.save(out / files[name])
            for q in asked:
                said = {}
                for row in SIDE_BY_SIDE:
                    model, processor = self.loaded(entries[row].checkpoint)
                    shown, longest = [] if image is None else [image], 64 if q.task == "caption" else 8
                    with under(model, entries[row].recipe):
                        answer = ask(model, processor, q.instruction, shown, max_new_tokens=longest)
                    said[row] = answer.text
                    if answer.kept and overlay is not None and overlay not in files:
                        files[overlay] = f"{overlay}.png"
                        save_overlay(out / files[overlay], answer.pictures, answer.kept_visual(), answer.grids)
                # a caption may name the objects in any order: shown, not marked
                right = {n: is_right(t, q.answer) for n, t in said.items()} if q.task != "caption" else {}
                about = None if image is None else files[name]
                results.append(
                    SideBySide(
                        task=q.task, image=about, question=q.instruction, expected=q.answer, answers=said, right=right
                    )
                )
        table = Table(title="The same questions, three models")
        for name in ("image", "question", "expected", *SIDE_BY_SIDE):
            table.add_column(name, overflow="fold")
        for r in results:
            styles = {n: {True: "green", False: "red", None: ""}[r.right.get(n)] for n in SIDE_BY_SIDE}
            table.add_row(
                r.image or "-", r.question, r.expected, *(Text(r.answers[n], style=styles[n]) for n in SIDE_BY_SIDE)
            )
        self.console.print(table)
        return results, files

    def evaluate(self, entries: list[Entry]) -> Evaluation:
        """Stage 5: all rows on the held-out questions, then single requests with an image timed in turns."""
        questions = held_out(self.settings.questions, self.config)
        answered = self.answers(entries, questions)
        blind = self.answers([replace(entries[0], name="blind")], [q.without_image() for q in questions])["blind"][0]
        seconds = [spent for _, spent in answered.values()]
        self.cache.timings.append({"stage": "answers", "seconds": round(sum(seconds), 2), "reused": not any(seconds)})
        timed = [q for q in questions if q.open_image is not None][:TIMED_QUESTIONS]
        costs = self.costs(entries, timed)
        return summarise(
            questions,
            [Answered(self.spec(entry), *answered[entry.name], costs[entry.name]) for entry in entries],
            Settings(seed=self.settings.seed),
            baseline="float",
            blind=blind,
            compare=COMPARISONS,
            timed_requests=len(timed),
        )

    def environment(self) -> Environment:
        import torch
        import transformers

        import quota

        return Environment(
            quota=quota.__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            cpu=cpu()["name"],
            threads=torch.get_num_threads(),
            native=describe_native(),
        )


def run_demo(settings: DemoSettings) -> Report:
    """All stages; returns the report it also writes to `out/report.json`. Every file appears whole or not at all."""
    from quota.report.plots import save_profile_plot, save_recipe_plot

    demo = Demo(settings)
    out, say = settings.out, demo.console.print
    facts = demo.facts()

    demo.title(2, f"calibration to {DEFAULT.title}")
    quantized = demo.quantized()
    link(out / "quantized", Path(quantized))
    say(f"{out / 'quantized'}: {weight_bytes(Path(quantized)) / 1e6:.2f} MB (float: {facts.float_bytes / 1e6:.2f} MB)")

    demo.title(3, f"profile and allocation, keep {settings.keep:g}")
    profile = demo.profile
    recipes = {"collaborative": out / "recipe.json", "uniform": out / "uniform.json"}
    plans = {"collaborative": demo.planned("quota", settings.keep), "uniform": demo.planned("uniform", settings.keep)}
    for name, plan in plans.items():
        plan.save(recipes[name])
    save_profile_plot(out / "profile.png", profile, plans["collaborative"])
    save_recipe_plot(out / "recipe.png", plans["collaborative"])
    say(explain_text(plans["collaborative"]), markup=False, highlight=False)

    demo.title(4, "answers side by side")
    label, original = facts.checkpoint, demo.float_checkpoint

    def row(name: str, checkpoint: str, weights: str, plan: str | None = None) -> Entry:
        if plan is None:
            return Entry(name, checkpoint, weights)
        return Entry(name, checkpoint, weights, plans[plan], recipe_file=recipes[plan].name)

    made = [
        row("float", original, label),
        row("quant-only", quantized, "quantized"),
        row("prune-only", original, label, "uniform"),
        row("quantize-then-prune", quantized, "quantized", "uniform"),
        row("collaborative", quantized, "quantized", "collaborative"),
        row("quant-rtn", ROUNDED, f"{label}, rounded to nearest"),
    ]
    entries = {entry.name: entry for entry in made}
    answers, files = demo.side_by_side(entries)

    demo.title(5, f"evaluation on {settings.questions} held-out questions")
    say("prune-then-quantize: the decoder calibrated once more, on the graph the uniform recipe prunes")
    pruned_first = demo.quantized(recipe=plans["uniform"])
    entries["prune-then-quantize"] = row(
        "prune-then-quantize", pruned_first, "quantized on the pruned graph", "uniform"
    )
    evaluation = demo.evaluate([entries[name] for name in ROWS])
    for table in evaluation_tables(evaluation):
        say(table)
    for remark in remarks(evaluation):
        say(remark, markup=False, highlight=False)

    demo.title(6, "report")
    report = Report(
        environment=demo.environment(),
        model=facts,
        keep=settings.keep,
        calibration=json.loads((Path(quantized) / "quota.json").read_text())["calibration"],
        recipes={name: explain(plan) for name, plan in plans.items()},
        profile=profile.to_json(),
        answers=answers,
        evaluation=evaluation,
        files={**files, **FILES},
        stages=[Stage(**t) for t in demo.cache.timings],
    )
    atomic_write_text(out / "report.json", report.model_dump_json(indent=1) + "\n")
    for what in (*files, "profile_plot", "recipe_plot"):
        say(f"{what:<18} {out / report.files[what]}")
    say(f"{'report':<18} {out / 'report.json'}")
    return report
