"""The studies that are figures of the model itself: layer profiles, and kept tokens over images."""

from __future__ import annotations

import json
from typing import Any

from quota.allocate.explain import compact_layers
from quota.core.errors import UsageError
from quota.core.files import atomic_write_text
from quota.core.formats import DEFAULT
from quota.core.recipe import Recipe
from quota.eval.asking import ask
from quota.eval.generation import under
from quota.report.table import markdown_table
from quota.study.bench import Bench

SHOWN = ("quota", "fastv", "divprune", "grid")


def profile_study(bench: Bench) -> dict[str, Any]:
    """Figures 3 and 5: per decoder layer concentration, redundancy, sensitivity, and what QUOTA makes of them."""
    from quota.report.plots import save_profile_plot

    out, profile = bench.settings.out, bench.profile
    recipe = bench.planned("quota", bench.settings.keep)
    save_profile_plot(out / "profile.png", profile, recipe)
    report = {
        "study": "profile",
        "family": bench.family,
        "profile": profile.to_json(),
        "recipe": recipe.model_dump(mode="json"),
        "files": {"markdown": "profile.md", "json": "profile.json", "plot": "profile.png"},
    }
    _write(bench, report, profile_markdown(report))
    return report


def profile_markdown(report: dict[str, Any]) -> str:
    """The profile report as a table."""
    profile, recipe = report["profile"], Recipe.parse(report["recipe"])
    rows = [
        [
            str(i),
            f"{profile['concentration_median'][i]:.3f}",
            f"{profile['concentration_q25'][i]:.3f} to {profile['concentration_q75'][i]:.3f}",
            f"{profile['redundancy_median'][i]:.3f}",
            f"{profile['sensitivity'][i]:.4g}",
            str(recipe.tokens_at(i)),
        ]
        for i in range(recipe.model.layers)
    ]
    columns = ["layer", "concentration", "quartiles", "redundancy", "sensitivity", "visual tokens"]
    return (
        f"### Layer profile\n\n{profile['samples']} calibration samples; concentration: attention share of the ten"
        " strongest visual tokens; redundancy: median cosine between visual tokens; sensitivity: relative error of the"
        f" layer's input under {profile['regime']}. Layers {compact_layers(recipe.candidates)} drop"
        f" tokens.\n\n{markdown_table(columns, rows)}"
    )


def show_study(bench: Bench) -> dict[str, Any]:
    """Figure 4: for the first question with an image, what each method keeps at each of its layers, and the
    answers."""
    from quota.report.overlay import save_overlay

    asked = next((q for q in bench.questions if q.open_image is not None), None)
    if asked is None or asked.open_image is None:
        raise UsageError("tasks: expected at least one question with an image, got none")
    out, image = bench.settings.out, asked.open_image()
    answers: dict[str, Any] = {}
    for method in SHOWN:
        recipe = bench.planned(method, bench.settings.keep)
        model, processor = bench.loaded(bench.quantized(), bench.settings.place)
        with under(model, recipe):
            answer = ask(model, processor, asked.instruction, [image], max_new_tokens=bench.settings.max_new_tokens)
        path = f"show-{method}.png"
        save_overlay(out / path, answer.pictures, answer.kept_visual(), answer.grids)
        kept = {str(layer): int(mask.sum()) for layer, mask in answer.kept_visual().items()}
        answers[method] = {"answer": answer.text, "visual_tokens": kept, "overlay": path}
    report = {
        "study": "show",
        "family": bench.family,
        "question": asked.instruction,
        "expected": asked.answer,
        "methods": answers,
        "files": {"markdown": "show.md", "json": "show.json"},
    }
    _write(bench, report, show_markdown(report))
    return report


def show_markdown(report: dict[str, Any], folder: str = "") -> str:
    """The report as a table with its images, which are in `folder` of the page."""
    methods = report["methods"]
    rows = [
        [name, a["answer"], ", ".join(f"{n} at {at}" for at, n in a["visual_tokens"].items())]
        for name, a in methods.items()
    ]
    return (
        f"### Kept tokens\n\nQuestion: {report['question']} Expected: {report['expected']}. Weights:"
        f" {DEFAULT.title}; 0 is before the language model.\n\n"
        + markdown_table(["method", "answer", "visual tokens alive"], rows)
        + "".join(f"\n{name}:\n\n![Tokens kept by {name}]({folder}{a['overlay']})\n" for name, a in methods.items())
    )


def _write(bench: Bench, report: dict[str, Any], text: str) -> None:
    atomic_write_text(bench.settings.out / report["files"]["markdown"], text)
    atomic_write_text(bench.settings.out / report["files"]["json"], json.dumps(report, indent=1) + "\n")
