"""Arguments, pruning, batches, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quota.core.errors import CheckpointError, QuotaError, RecipeError, UsageError
from quota.core.recipe import Recipe
from quota.lmms import model as m
from quota.lmms.model import Quota
from quota.models import model_fingerprint
from quota.planning.facts import model_facts
from quota.runtime.load import load

Asked = Callable[[Any, list[str], int], dict[str, list[str]]]


@pytest.fixture(scope="module")
def recipe(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps 8 of 16 visual tokens from layer 1 on and 4 from layer 2 on."""
    model = load(llava_folder)
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    facts = model_facts(model, model_fingerprint(model), [16], [10])
    made = Recipe(
        method="quota",
        regime="float",
        model=facts,
        candidates=(1, 2),
        keep=(0.5, 0.25),
        final_keep=0.25,
        tau=1.0,
        reference="recorded",
        reference_tokens=16,
        sensitivities=(0.2, 0.1),
    )
    made.save(path)
    return path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "pretrained"),
        ({"pretrained": "x", "bits": 4}, "bits"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size"),
        ({"pretrained": "x", "dtype": "int3"}, "int3"),
    ],
)
def test_wrong_arguments_are_named_and_the_known_ones_listed(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"model_args: .*{words}.*known: pretrained, recipe"):
        Quota(**given)


def test_wrong_values(llava_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Quota(pretrained=str(tmp_path / "nowhere"))
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(RecipeError, match=r"r\.json"):
        Quota(pretrained=str(llava_folder), recipe=str(tmp_path / "r.json"))
    with pytest.raises(UsageError, match=r"device.*warp9"):
        Quota(pretrained=str(llava_folder), device="warp9")


def test_lmms_evals_own_command_ends_with_status_one(
    llava_folder: Path, ask: Asked, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would swallow an exception and end with 0; an exit it lets through."""
    with pytest.raises(SystemExit) as left:
        Quota.create_from_arg_string("pretrained=nowhere/at/all")
    assert left.value.code == 1 and "error: nowhere/at/all" in capsys.readouterr().err
    made = Quota.create_from_arg_string(f"pretrained={llava_folder}", {"batch_size": "2", "device": None})

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(m, "generate", fails)
    with pytest.raises(SystemExit) as left:
        ask(made, ["quota_scenes_choice"], 1)
    assert left.value.code == 1 and "out of luck" in capsys.readouterr().err


def test_kept_tokens_times_and_texts_are_logged_per_question(
    llava_folder: Path, recipe: Path, ask: Asked, tmp_path: Path
) -> None:
    texts = ask(
        Quota(pretrained=str(llava_folder), recipe=str(recipe), answers=tmp_path, batch_size=2),
        ["quota_scenes_relation"],
        3,
    )
    (path,) = tmp_path.iterdir()
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["recipe"] == str(recipe)
    assert [row["text"] for row in rows] == texts["quota_scenes_relation"] and [row["doc_id"] for row in rows] == [
        0,
        1,
        2,
    ]
    for row in rows:
        assert row["visual_tokens"] == 16 and row["visual_tokens_by_layer"] == [16, 8, 4]
        assert row["prompt_tokens"] > 16 and 1 <= row["new_tokens"] <= 6 and row["prefill_ms"] > 0
        assert row["power_w"] is None and row["peak_memory_bytes"] is None
    assert [row["batch"] for row in rows] == [2, 2, 1]


def test_the_engine_answers_as_generate(
    llava_folder: Path, qwen_folder: Path, recipe: Path, ask: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A W4A4KV4 checkpoint of each family: texts, counts and visual tokens of every line, pruned too."""
    from quota.calib.run import calibrate
    from quota.calib.samples import Samples
    from quota.calib.settings import Settings
    from quota.scenes import assets

    for name, folder, task in (
        ("llava", llava_folder, "quota_scenes_relation"),
        ("qwen2_5_vl", qwen_folder, "quota_pages_chart"),
    ):
        samples = Samples.load(assets.write_calibration(tmp_path / f"{name}-samples", 2, family=name))
        calibrate(folder, samples, out=tmp_path / name, settings=Settings(steps=0), progress=False)
        given = {"pretrained": str(tmp_path / name), "batch_size": 2}
        if name == "llava":
            given["recipe"] = str(recipe)
        rows = {}
        for how in ("engine", "generate"):
            with monkeypatch.context() as patch:
                if how == "generate":
                    patch.setattr(m, "why_not_engine", lambda model: "asked for")
                made = Quota(**given, answers=tmp_path / f"{name}-{how}")
                ask(made, [task], 3)
                assert (made._engine == (None,)) == (how == "generate")
                rows[how] = [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in made.records().values()]
        assert rows["engine"] == rows["generate"] and len(rows["engine"]) == 3
        if name == "llava":
            assert rows["engine"][0]["visual_tokens_by_layer"] == [16, 8, 4]


def test_batches_answer_like_single_requests(llava_folder: Path, recipe: Path, ask: Asked) -> None:
    tasks = ["quota_scenes_choice", "quota_scenes_position"]
    alone, together = (
        ask(Quota(pretrained=str(llava_folder), recipe=str(recipe), batch_size=size), tasks, 3) for size in (1, 3)
    )
    assert alone == together


def test_a_stopped_run_goes_on_and_other_content_does_not(
    llava_folder: Path, ask: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, given = ["quota_scenes_existence"], {"pretrained": str(llava_folder), "answers": tmp_path, "batch_size": 2}
    whole = ask(Quota(**given), tasks, 4)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + '{"request": "tor')
    calls = []
    generate = m.generate
    monkeypatch.setattr(m, "generate", lambda *args, **kwargs: calls.append(1) or generate(*args, **kwargs))
    resumed = Quota(**given)
    assert ask(resumed, tasks, 4) == whole and len(calls) == 1
    again = Quota(**given)
    assert ask(again, tasks, 4) == whole and len(calls) == 1 and again._opened is None
    ask(Quota(**{**given, "dtype": "bfloat16"}), tasks, 4)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 2


def test_sampling_and_other_kinds_of_task_are_refused(llava_folder: Path, manager: Any) -> None:
    from lmms_eval import evaluator

    made = Quota(pretrained=str(llava_folder))
    with pytest.raises(UsageError, match=r"quota_scenes_choice.*answers greedily"):
        evaluator.simple_evaluate(
            model=made,
            tasks=["quota_scenes_choice"],
            task_manager=manager,
            limit=1,
            gen_kwargs="temperature=0.7",
            bootstrap_iters=0,
        )
    for method in (made.loglikelihood, made.generate_until_multi_round):
        with pytest.raises(QuotaError, match="generate_until"):
            method([])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_frequencies_keep_their_bits(llava_folder: Path, qwen_folder: Path, dtype: str) -> None:
    """The plug-in has no way of its own to a float type: a rounded frequency is 0.26 off in the cosine at position
    600."""
    for folder in (llava_folder, qwen_folder):
        exact, low = load(folder), Quota(pretrained=str(folder), dtype=dtype).opened()[0]
        found = {name: buffer for name, buffer in low.named_buffers() if "inv_freq" in name}
        assert found and next(low.parameters()).dtype == getattr(torch, dtype)
        for name, buffer in found.items():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, exact.get_buffer(name)), name
