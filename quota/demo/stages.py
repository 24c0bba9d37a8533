"""The six stages of `quota demo`."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quota.allocate.explain import explain, explain_text
from quota.allocate.profile import Profile
from quota.calib.samples import Samples
from quota.calib.stream import FloatSource
from quota.core.files import atomic_write_text, claim_folder
from quota.core.folders import resolve_folder
from quota.core.recipe import Recipe
from quota.demo.cache import StageCache, code_fingerprint, link
from quota.demo.embedded import held_out, reference_of, sources, tour
from quota.demo.report import Environment, ModelFacts, Report, SideBySide, Stage
from quota.eval.asking import ask, load_model
from quota.eval.benchmark import Answered, RowSpec, Settings, summarise, weight_bytes
from quota.eval.compare import TIMED_QUESTIONS, answer_rows, bars, folder_fingerprint, row_spec
from quota.eval.generation import Cost, measure_cost
from quota.eval.machine import cpu, describe_native
from quota.eval.profiling import allocate, profile_models
from quota.eval.questions import Question, questions_fingerprint
from quota.eval.remarks import remarks
from quota.eval.results import Evaluation
from quota.eval.score import is_right
from quota.eval.tables import evaluation_tables

MODULES = ("vision", "projector", "llm")
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


class Demo:
    """One run: the settings, the cache, and the models loaded so far."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.console = Console(stderr=settings.quiet, width=max(Console().width, 126))
        self.float_checkpoint, samples = sources(settings.family, settings.model, settings.samples)
        claim_folder(settings.out)
        self.samples = Samples.load(samples)
        self.config = FloatSource(self.float_checkpoint).config
        self.float_key = folder_fingerprint(self.float_checkpoint)
        self.cache = StageCache(settings.out / "cache", code_fingerprint())
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def title(self, number: int, text: str) -> None:
        self.console.print(f"\n[bold]{number}/6  {text}[/bold]")

    def opened(self, spec: RowSpec) -> tuple[Any, Any]:
        """Each row's model once per run: the embedded ones are small."""
        if spec.key not in self._loaded:
            self._loaded[spec.key] = spec.open()
        return self._loaded[spec.key]

    # -- stages --------------------------------------------------------------------------------------------------------

    def facts(self) -> ModelFacts:
        """Stage 1: the float checkpoint and its samples."""
        from quota.calib.evidence import measured_facts
        from quota.models import find_family

        self.title(1, "float checkpoint and calibration samples")
        model, processor = load_model(self.float_checkpoint)
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
            f" {'of the median picture' if facts.image_size_px is None else 'per picture'}; {facts.samples} samples"
        )
        return facts

    def quantize(self, stage: str, recipe: Path | None = None) -> Path:
        """Stage 2 (and once more, on the pruned graph, for prune-then-quantize): a W4A4KV4 checkpoint."""
        from quota.calib.run import calibrate
        from quota.calib.settings import DEFAULTS, Settings

        s = self.settings
        steps = DEFAULTS.steps if s.steps is None else s.steps
        loaded = Recipe.load(recipe) if recipe else None
        parts = {
            "float": self.float_key,
            "samples": self.samples.fingerprint,
            "steps": s.steps,
            "seed": s.seed,
            "recipe": loaded and loaded.dumps(),
        }

        def work(path: Path) -> None:
            calibrate(
                self.float_checkpoint,
                self.samples,
                out=path,
                settings=Settings(modules=MODULES, seed=s.seed, steps=steps),
                recipe=loaded,
                progress=not s.quiet,
                overwrite=True,
            )

        return self.cache.make(stage, parts, work)

    def profile(self, quantized: Path) -> Profile:
        """Stage 3, first half: what each layer looks like."""
        s = self.settings
        parts = {
            "float": self.float_key,
            "quantized": folder_fingerprint(quantized),
            "samples": self.samples.fingerprint,
        }
        path = self.cache.make(
            "profile",
            parts,
            lambda p: profile_models(self.float_checkpoint, quantized, self.samples, quiet=s.quiet).save(p),
        )
        return Profile.load(path)

    def rtn_spec(self, label: str) -> RowSpec:
        """Quantized without calibration or transforms, in memory: what calibration is worth."""
        from quota.models.quantize import weight_bytes as tensor_bytes
        from quota.models.rtn import quantize_rtn

        def opened() -> tuple[Any, Any]:
            model, processor = load_model(self.float_checkpoint)
            return quantize_rtn(model, MODULES, transforms=False).eval(), processor

        key = f"{self.float_key} rtn"
        model, _ = self._loaded.setdefault(key, opened())
        return RowSpec("quant-rtn", f"{label}, rounded to nearest", None, key, tensor_bytes(model), "int4", opened)

    def side_by_side(self, specs: dict[str, RowSpec]) -> tuple[list[SideBySide], dict[str, str]]:
        """Stage 4: the tour's questions in three rows; its pictures, and the tokens kept for the first question about
        each."""
        from quota.report.overlay import save_overlay

        out, results = self.settings.out, list[SideBySide]()
        files: dict[str, str] = {}
        for name, asked in tour(self.config).items():
            picture = asked[0].open_image() if asked[0].open_image is not None else None
            overlay = None if picture is None else "overlay" if name == "picture" else f"overlay-{name}"
            if picture is not None:
                files[name] = f"{name}.png"
                picture.save(out / files[name])
            for q in asked:
                said = {}
                for row in SIDE_BY_SIDE:
                    answer = ask(
                        *self.opened(specs[row]),
                        q.instruction,
                        [] if picture is None else [picture],
                        max_new_tokens=64 if q.task == "caption" else 8,
                    )
                    said[row] = answer.text
                    if answer.kept and overlay is not None and overlay not in files:
                        files[overlay] = f"{overlay}.png"
                        save_overlay(out / files[overlay], picture, answer.kept_visual(), answer.grids)  # type: ignore[arg-type]
                # a caption may name the objects in any order: shown, not marked
                right = {n: is_right(t, q.answer) for n, t in said.items()} if q.task != "caption" else {}
                about = None if picture is None else files[name]
                results.append(
                    SideBySide(
                        task=q.task, picture=about, question=q.instruction, expected=q.answer, answers=said, right=right
                    )
                )
        table = Table(title="The same questions, three models")
        for name in ("picture", "question", "expected", *SIDE_BY_SIDE):
            table.add_column(name, overflow="fold")
        for r in results:
            styles = {n: {True: "green", False: "red", None: ""}[r.right.get(n)] for n in SIDE_BY_SIDE}
            table.add_row(
                r.picture or "-", r.question, r.expected, *(Text(r.answers[n], style=styles[n]) for n in SIDE_BY_SIDE)
            )
        self.console.print(table)
        return results, files

    def evaluate(self, specs: dict[str, RowSpec]) -> Evaluation:
        """Stage 5: all rows on the held-out questions, then single requests with a picture timed in turns."""
        s = self.settings
        questions = held_out(s.questions, self.config)
        settings = Settings(seed=s.seed)
        rows = list(specs.values())
        began_with = set(self._loaded)
        answered = answer_rows(rows, questions, self.cache.folder / "answers", settings, self.opened, quiet=s.quiet)
        blind_spec = replace(specs["float"], name="blind")
        blind = answer_rows(
            [blind_spec],
            [q.without_image() for q in questions],
            self.cache.folder / "answers",
            settings,
            self.opened,
            quiet=s.quiet,
        )
        reused = all(seconds == 0 for _, seconds in answered.values()) and set(self._loaded) == began_with
        self.cache.timings.append(
            {"stage": "answers", "seconds": round(sum(v for _, v in answered.values()), 2), "reused": reused}
        )
        timed = [q for q in questions if q.open_image is not None][:TIMED_QUESTIONS]
        costs = self.costs(rows, timed)
        return summarise(
            questions,
            [Answered(spec, *answered[spec.name], costs[spec.name]) for spec in rows],
            settings,
            baseline="float",
            blind=blind["blind"][0],
            compare=COMPARISONS,
            timed_requests=len(timed),
        )

    def costs(self, rows: list[RowSpec], questions: list[Question]) -> dict[str, Cost]:
        parts = {
            "rows": [[r.name, r.key] for r in rows],
            "questions": questions_fingerprint(questions),
            "machine": platform.node(),
        }

        def work(path: Path) -> None:
            with bars(self.settings.quiet) as progress:
                bar = progress.add_task("timing", total=len(rows) * (len(questions) + 1))
                measured = measure_cost(
                    {r.name: self.opened(r) for r in rows}, questions, progress=lambda: progress.advance(bar)
                )
            atomic_write_text(path, json.dumps({name: asdict(cost) for name, cost in measured.items()}) + "\n")

        path = self.cache.make("cost", parts, work)
        return {name: Cost(**values) for name, values in json.loads(path.read_text()).items()}

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
    reference = reference_of(demo.config)

    demo.title(2, "calibration to W4A4KV4")
    quantized = demo.quantize("quantized")
    link(out / "quantized", quantized)
    say(f"{out / 'quantized'}: {weight_bytes(quantized) / 1e6:.2f} MB (float: {facts.float_bytes / 1e6:.2f} MB)")

    demo.title(3, f"profile and allocation, keep {settings.keep:g}")
    profile = demo.profile(quantized)
    recipes = {"collaborative": out / "recipe.json", "uniform": out / "uniform.json"}
    plans = {
        name: allocate(profile, keep=settings.keep, method=method, reference=reference)
        for name, method in (("collaborative", "quota"), ("uniform", "uniform"))
    }
    for name, plan in plans.items():
        plan.save(recipes[name])
    save_profile_plot(out / "profile.png", profile, plans["collaborative"])
    save_recipe_plot(out / "recipe.png", plans["collaborative"])
    say(explain_text(plans["collaborative"]), markup=False, highlight=False)

    demo.title(4, "answers side by side")
    label = facts.checkpoint
    specs = {
        "float": row_spec("float", demo.float_checkpoint, label=label),
        "quant-only": row_spec("quant-only", quantized, label="quantized"),
        "prune-only": row_spec("prune-only", demo.float_checkpoint, recipes["uniform"], label),
        "quantize-then-prune": row_spec("quantize-then-prune", quantized, recipes["uniform"], "quantized"),
    }
    collaborative = row_spec("collaborative", quantized, recipes["collaborative"], "quantized")
    answers, files = demo.side_by_side({**specs, "collaborative": collaborative})

    demo.title(5, f"evaluation on {settings.questions} held-out questions")
    say("prune-then-quantize: calibrating once more, on the graph the uniform recipe prunes")
    pruned_first = demo.quantize("quantized-pruned", recipes["uniform"])
    specs["prune-then-quantize"] = row_spec(
        "prune-then-quantize", pruned_first, recipes["uniform"], "quantized on the pruned graph"
    )
    specs["collaborative"] = collaborative
    specs["quant-rtn"] = demo.rtn_spec(label)
    evaluation = demo.evaluate(specs)
    for table in evaluation_tables(evaluation):
        say(table)
    for remark in remarks(evaluation):
        say(remark, markup=False, highlight=False)

    demo.title(6, "report")
    report = Report(
        environment=demo.environment(),
        model=facts,
        keep=settings.keep,
        calibration=json.loads((quantized / "quota.json").read_text())["calibration"],
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
