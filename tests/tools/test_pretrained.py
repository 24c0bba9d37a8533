"""The trainer of the pretrained model, on a tiny one: it trains what inference sees, stops and goes on, and its small
file makes the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from quota.calib.samples import Samples
from quota.scenes import captions, crowds
from quota.scenes import generate as g
from quota.scenes.model import build_tokenizer
from tests.tiny import tiny_dinov2
from tools.pretrained import build, deltas, evaluate, parts, samples, train
from tools.pretrained.lessons import CAPTION, MIX, Prompts, Segment, lesson, natural, pixels
from tools.pretrained.train import Plan, Run

PLAN = Plan(
    dense_lessons=4, dense_steps=2, dense_batch=2, describe_steps=1, describe_batch=1, steps=2, batch=1, dense_lr=0.01
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with 336 px images, and a tokenizer; the chat's markers are unknown words to it, which changes
    nothing here."""
    path = tmp_path_factory.mktemp("parts")
    tiny_dinov2(image_size=336, layers=2).half().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def student_run(folder, tmp_path):
    run = Run(tmp_path / "run", folder, PLAN, None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in run.parameters.items():
            if name.endswith("lora_b"):  # zero to begin with
                p.copy_((0.05 * torch.randn(p.shape, generator=generator)).bfloat16())
    return run


def test_lessons_are_pure_functions_of_split_and_number():
    for number in range(len(MIX)):
        first, again = lesson("train", number), lesson("train", number)
        assert first.segments == again.segments and first.kind == MIX[number]
        assert all(len(labels) == 576 * len(first.images) for labels in first.labels.values())
        held_out = lesson("test", number)
        tasks = [segment.task for segment in held_out.segments]
        assert len(tasks) == len(set(tasks)) and CAPTION not in tasks
    brief = lesson("train", 0, brief=True)
    assert brief.segments[-1].task == CAPTION and len(brief.segments) == 7
    assert brief.segments[-1].turns[0][1] == captions.caption(crowds.crowd("train", 0))


def test_words_as_people_write_them():
    asked = {q.task: natural(q.text) for q in g.questions(g.scene("train", 0))}
    assert asked["existence"].startswith("is there a ") and asked["existence"].endswith(" in the picture?")
    assert natural("red bread seven , blue fish two") == "red bread seven, blue fish two"
    assert natural("is there a sign that says bank ?") == "is there a sign that says bank?"


@torch.no_grad()
def merged(folder, run):
    """transformers' own model with what a run trained, rounded to bfloat16 in both."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    weights = {n: t.float() for n, t in deltas.rounded(run.student.projector, run.parameters).items()}
    for name, p in run.parameters.items():
        p.copy_(weights[name])
    model.model.multi_modal_projector.load_state_dict(run.student.projector.folded())
    for name in [name for name in weights if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        linear = model.model.language_model.get_submodule(path)
        linear.weight.add_(2.0 * weights[f"{path}.lora_b"] @ weights[name])
    return model


@torch.no_grad()
def test_a_packed_segment_sees_what_a_single_prompt_does(folder, student_run):
    """Of one image and of two: every state of every segment against the model's own forward on that segment alone."""
    run, model = student_run, merged(folder, student_run)
    prompts, image = run.prompts, model.config.image_token_id
    for number in (1, MIX.index("change")):
        found = lesson("test", number)
        _, states, packed = run._states(found)
        lead = [*prompts.before, *[image] * 576]
        for _ in found.images[1:]:
            lead += [*prompts.newline, *[image] * 576]
        for at in range(1, len(found.segments) + 1):
            mine = packed.segment == at
            ids = torch.tensor([[*lead, *packed.ids[mine].tolist()]])
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels(found.images))
            alone = out.logits[0, len(lead) :]
            torch.testing.assert_close(states[mine] @ run.student.words.T, alone, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_a_run_begins_with_the_deltas_of_another(folder, student_run, tmp_path):
    """Rounded to bfloat16 on the way; the dense stage is done, unless the file is of another kind of projector."""
    projector, file = student_run.student.projector, tmp_path / "deltas.safetensors"
    state = deltas.rounded(projector, student_run.parameters)
    deltas.write(file, state)
    again = Run(tmp_path / "run", folder, PLAN, file)
    assert again.dense == PLAN.dense_steps
    features = projector.mean + projector.deviation * torch.randn(7, len(projector.mean))
    torch.testing.assert_close(again.student.projector(features), projector(features), rtol=0.03, atol=0.03)
    for name, p in student_run.parameters.items():
        if ".lora_" in name:
            torch.testing.assert_close(again.parameters[name], p, rtol=0.01, atol=1e-6)
    deltas.write(file, {name: tensor for name, tensor in state.items() if not name.startswith("features.")})
    assert Run(tmp_path / "other", folder, PLAN, file).dense == 0


def test_blocks_hold_whole_segments():
    prompts = Prompts(build_tokenizer())
    packed = prompts.pack(lesson("train", 0, brief=True).segments)
    blocks = packed.blocks(40)
    assert [begin for begin, _ in blocks] == [0, *(end for _, end in blocks[:-1])] and blocks[-1][1] == len(packed.ids)
    for (_, end), (begin, _) in pairwise(blocks):
        assert packed.segment[end - 1] != packed.segment[begin]
    counts = packed.segment.bincount()
    assert all(end - begin <= max(40, int(counts.max())) for begin, end in blocks)


@pytest.mark.parametrize("survived", [1, 2])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch, survived):
    """The process dies inside the step after `survived` of three; the next one starts there."""
    whole = Run(tmp_path / "whole", folder, PLAN, None)
    whole.train_dense()
    whole.train_language(eval_every=2, eval_lessons=2)

    monkeypatch.setattr(train, "_SAVE_SECONDS", -1)
    real, calls = Run._losses, []

    def dies(run, found):
        if len(calls) == survived:
            raise KeyboardInterrupt
        calls.append(found)
        return real(run, found)

    monkeypatch.setattr(Run, "_losses", dies)
    killed = Run(tmp_path / "killed", folder, PLAN, None)
    killed.train_dense()
    with pytest.raises(KeyboardInterrupt):
        killed.train_language(eval_every=100, eval_lessons=2)
    monkeypatch.setattr(Run, "_losses", real)
    again = Run(tmp_path / "killed", folder, replace(PLAN, dense_steps=9), None)  # what is done is not done again
    assert (again.dense, again.step) == (2, survived)
    again.train_dense()
    again.train_language(eval_every=100, eval_lessons=2)
    assert again.step == whole.step == 3
    for name, tensor in whole.parameters.items():
        assert torch.equal(again.parameters[name], tensor) and torch.equal(again.mean[name], whole.mean[name]), name


def test_the_log_says_how_far_and_how_well(folder, tmp_path):
    run = Run(tmp_path / "run", folder, replace(PLAN, describe_steps=5, steps=5), None)
    run.train_dense()
    run.train_language(eval_every=100, eval_lessons=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"features", "dense", "describe", "ask", "evaluation"} == {line["stage"] for line in lines}
    assert all("hours_left" in line for line in lines if line["stage"] != "evaluation")
    assert lines[-1]["of"] == sum(of for tasks in lines[-1]["by_task"].values() for _, of in tasks.values()) > 10


def test_the_projector_without_its_standardizing_is_the_same(folder, student_run):
    projector = student_run.student.projector
    features = 3 + torch.randn(2, 576, 32) * torch.logspace(-1, 2, 32)
    projector.standardize(features)
    own = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.multi_modal_projector
    own.load_state_dict(projector.folded())
    torch.testing.assert_close(own(features), projector(features), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_folded_layer_scale_leaves_the_tower_as_it_is():
    model = tiny_dinov2()
    tower, images = model.model.vision_tower, torch.randn(2, 3, 56, 56)
    wanted = tower(images).last_hidden_state
    state = parts.fold_layer_scale(dict(tower.state_dict()))
    assert all(bool((tensor == 1).all()) for name, tensor in state.items() if name.endswith("lambda1"))
    tower.load_state_dict(state)
    torch.testing.assert_close(tower(images).last_hidden_state, wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture
def assembled(folder, monkeypatch):
    """`parts.assemble` gives the tiny model."""

    def assemble(wheels):
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float16), build_tokenizer()

    monkeypatch.setattr(parts, "fetch", lambda path: path)
    monkeypatch.setattr(parts, "assemble", assemble)


def test_exported_deltas_make_the_checkpoint_that_they_name(folder, student_run, assembled, tmp_path):
    trained = tmp_path / "deltas.safetensors"
    digest = evaluate.export(student_run, tmp_path, trained)
    assert digest == deltas.digest_of(trained) == build.build(tmp_path / "out", trained)
    made = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "checkpoint", dtype=torch.float16)
    assert build.tensor_digest(made) == digest != build.build(tmp_path / "untrained", None)
    layer = made.model.language_model.layers[1].mlp.up_proj.weight
    before = LlavaForConditionalGeneration.from_pretrained(folder).model.language_model.layers[1].mlp.up_proj.weight
    lora = student_run.student.language.layers[1].mlp.up_proj
    moved = 2.0 * lora.lora_b.detach() @ lora.lora_a.detach().bfloat16().float()
    torch.testing.assert_close(layer.float() - before.float(), moved, atol=5e-3, rtol=0.02)
    assert float(moved.abs().max()) > 0.05


def test_another_checkpoint_than_the_deltas_name_is_not_written(student_run, assembled, tmp_path):
    trained = tmp_path / "deltas.safetensors"
    state = deltas.rounded(student_run.student.projector, student_run.parameters)
    deltas.write(trained, state, digest="sha256:0")
    with pytest.raises(SystemExit, match="expected a checkpoint with fingerprint sha256:0"):
        build.build(tmp_path / "out", trained)
    assert not (tmp_path / "out" / "checkpoint").exists()


@torch.no_grad()
def test_captions_are_written_and_judged(folder, student_run, monkeypatch):
    monkeypatch.setattr(evaluate, "_LONGEST", 6)
    model, image = merged(folder, student_run), crowds.draw(crowds.crowd("test", 0))
    prompts = student_run.prompts
    asked = prompts.pack((Segment(CAPTION, (("describe the picture.", ""),)),)).ids[:-1]
    ids = torch.tensor([[*prompts.before, *[model.config.image_token_id] * 576, *asked.tolist()]])
    wanted = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels((image,)),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert evaluate.write_caption(student_run, image) == prompts.text(wanted[0, ids.shape[1] :].tolist())
    found = evaluate.caption_scores(student_run, 1)
    assert set(found) == {"crowd", "scene"} and found["crowd"]["objects"] >= 10
    said = "at the top left there is a small plain red star."
    monkeypatch.setattr(evaluate, "write_caption", lambda run, image: said)
    assert evaluate.caption_scores(student_run, 2)["scene"]["said"] == 2


def test_samples_are_balanced_and_of_their_split(tmp_path):
    found = Samples.load(samples.write(tmp_path / "held-out", "test", 26))
    assert [s.task for s in found][:3] == ["crowd/existence", "crowd/color", "scene/existence"]
    assert len({s.task for s in found}) > 18 and len({s.image_bytes for s in found}) == 26
    again = samples.write(tmp_path / "again", "test", 26)
    assert again.read_bytes() == (tmp_path / "held-out" / "samples.json").read_bytes()
    calibration = Samples.load(samples.write(tmp_path / "calibration", "calibration", 16))
    assert [s.task.endswith(("/caption", "/read")) for s in calibration] == [n % 4 == 3 for n in range(16)]
    assert not {s.image_bytes for s in found} & {s.image_bytes for s in calibration}
