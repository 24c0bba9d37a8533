"""The engine's accounts, refusals and faults; what it promises for every family: test_contract.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from quota.core.errors import UsageError
from quota.models.rtn import quantize_rtn
from quota.runtime.engine import Engine, EngineConfig, Prompt, QueueFull
from quota.runtime.patch import patched
from tests.engine.asking import asked, cases, engine, picture, prompt, recipes, run, same, tokens
from tests.prune.recipes import recipe_for
from tests.tiny import IMAGE_TOKEN, tiny_llava


def test_reuse_is_counted(model):
    made = engine(model)
    case = prompt(model, 3, picture(1), 12)
    first, again = (run(made, [asked(id, case)])[id][-1].usage for id in "ab")
    assert first.cached_tokens == 0
    assert again.cached_tokens > 3 + model.config.image_seq_length  # past the picture: nothing is chosen again
    other = run(made, [asked("c", prompt(model, 3, picture(1), 12, seed=9), recipe="compact")])["c"][-1].usage
    assert other.cached_tokens <= 4


def test_second_turn_equals_going_on(model):
    """A second turn, sent as a whole prompt, equals going on from the first turn's pruned cache."""
    a = picture(1)
    first = prompt(model, 3, a, 6, seed=2)
    for recipe in ("pruned", "compact"):
        with patched(model, recipes(model)[recipe]) as handle:
            ids = torch.tensor([list(first.ids)])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=a.pixels[None],
                max_new_tokens=5,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
                return_dict_in_generate=True,
            )
            kept = {layer: mask[0].nonzero()[:, 0].tolist() for layer, mask in handle.kept.items()}
            question = torch.tensor([[17, 33, 99, 41]])
            second = torch.cat([out.sequences, question], 1)
            more = model.generate(
                input_ids=second,
                attention_mask=torch.ones_like(second),
                past_key_values=out.past_key_values,
                max_new_tokens=5,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
            )
        whole = Prompt(second[0].tolist(), [a], len(first.ids))
        for made in (engine(model, default=recipe), engine(model, default=recipe, step_tokens=9)):
            assert (
                tokens(run(made, [asked("first", first, tokens=5)])["first"])
                == out.sequences[0, ids.shape[1] :].tolist()
            )
            sequence = made.submit(asked("second", whole, tokens=5))
            answer = tokens([output for _ in range(60) if made.busy for output in made.step()])
            assert answer == more[0, second.shape[1] :].tolist()
            assert sequence.request.prompt.selection_tokens == len(first.ids)
            if sequence.kept:  # not reused from the first turn
                assert {layer: rows[rows < len(first.ids)].tolist() for layer, rows in sequence.kept.items()} == kept


def test_pruning_gives_memory_back(model):
    case = prompt(model, 3, picture(1), 5)
    blocks = {}
    for recipe in (None, "pruned"):
        made = engine(model, default=recipe)
        made.submit(asked("a", case))
        while not made.scheduler.running or not made.scheduler.running[0].decoding:
            made.step()
        blocks[recipe] = made.pool.blocks - made.pool.available
        made.abort("a")
        made.step()
        made.check_integrity()
    text, visual, layers = 9, model.config.image_seq_length, 4
    assert blocks[None] == layers * -(-(text + visual + 1) // 4)
    assert blocks["pruned"] == sum(-(-(text + kept + 1) // 4) for kept in (16, 12, 8, 4))


def test_usage(model):
    usage = run(engine(model), [asked("a", prompt(model, 3, picture(1), 5))])["a"][-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.visual_tokens) == (25, 6, 16)
    assert usage.visual_by_layer == (16, 12, 8, 4) and usage.visual_kept == 4 and usage.selection_tokens == 25


def test_refusals(model):
    made = engine(model, pages=40, max_waiting=1)
    good = prompt(model, 4)
    with pytest.raises(UsageError, match="images"):
        made.submit(asked("a", Prompt([1, IMAGE_TOKEN, 3])))
    with pytest.raises(UsageError, match="at least one token"):
        made.submit(asked("a", Prompt([])))
    with pytest.raises(UsageError, match="token ids"):
        made.submit(asked("a", Prompt([1, 5000])))
    with pytest.raises(UsageError, match="selection_tokens"):
        made.submit(asked("a", prompt(model, 3, picture(1), 2, selection=9)))
    with pytest.raises(UsageError, match="blocks"):
        made.submit(asked("a", good, tokens=200))
    with pytest.raises(UsageError, match="no room"):
        made.submit(asked("a", prompt(model, 2048)))
    with pytest.raises(UsageError, match="recipe"):
        made.submit(asked("a", good, recipe="none such"))
    with pytest.raises(UsageError, match="segment boundary"):
        Engine(model).submit(asked("a", good, recipe=recipe_for(model)))
    made.submit(asked("a", good))
    with pytest.raises(UsageError, match="in use"):
        made.submit(asked("a", good))
    with pytest.raises(QueueFull):
        made.submit(asked("b", good))
    made.abort("a")
    made.abort("nobody")
    assert [output.reason for output in made.step()] == ["abort"]
    made.check_integrity()


def test_only_the_request_that_fails_fails(model, monkeypatch):
    asks = [asked(name, case) for name, case in cases("llava").items()]
    want = {name: tokens(out) for name, out in run(engine(model), asks).items()}
    made = engine(model)
    run_works = made.runner.run

    def fragile(works):
        if any(len(work.ids) == 10 and work.ids[1:3] == asks[0].prompt.ids[1:3] for work in works):
            raise RuntimeError("a fault inside the step")
        return run_works(works)

    monkeypatch.setattr(made.runner, "run", fragile)
    outputs = run(made, asks)
    assert outputs["text"][-1].reason == "error" and "a fault inside" in outputs["text"][-1].error
    assert {name: tokens(out) for name, out in outputs.items() if name != "text"} == {
        name: found for name, found in want.items() if name != "text"
    }


def test_unsuitable_models():
    with pytest.raises(UsageError, match="calibrate"):
        Engine(tiny_llava())
    model = quantize_rtn(tiny_llava())
    with patched(model, recipe_for(model)), pytest.raises(UsageError, match="installed"):
        Engine(model)
    with pytest.raises(UsageError, match="kv_bytes"):
        Engine(model, config=EngineConfig(kv_bytes=100))
    with pytest.raises(UsageError, match="max_running"):
        EngineConfig(max_running=0)


@pytest.mark.parametrize("seed", range(3))
def test_random_comings_and_goings(model, mixed, seed):
    """Submissions, aborts and steps in random order on a small pool: accounts balance after every operation, and who
    ends, ends as alone."""
    asks, alone = mixed
    rng = random.Random(seed)
    made = engine(model, pages=200, max_running=4, step_tokens=rng.choice((7, 30, 500)))
    live: list[str] = []
    ended: dict[str, str | None] = {}
    left = [replace(ask, id=f"{ask.id}/{turn}") for turn in range(2) for ask in asks]
    rng.shuffle(left)
    while left or made.busy:
        act = rng.random()
        if left and act < 0.3:
            live.append(left[-1].id)
            made.submit(left.pop())
        elif live and act < 0.34:
            made.abort(live.pop(rng.randrange(len(live))))
        else:
            ended |= {output.id: output.reason for output in made.step() if output.reason}
        made.check_integrity()
    assert set(ended.values()) <= {"length", "abort"} and sum(reason == "length" for reason in ended.values()) > 6
    whole = {id: seen for id, seen in made.seen.items() if ended[id] == "length"}
    assert same(whole, {id: alone[id.split("/")[0]] for id in whole})


def test_pictures_are_encoded_once(model, monkeypatch):
    made, encoded = engine(model), []
    encode = made.model.encode_images
    monkeypatch.setattr(made.model, "encode_images", lambda images: encoded.extend(images) or encode(images))
    run(made, [asked(str(i), prompt(model, 3, picture(1), 4, picture(2), i + 1)) for i in range(3)])
    assert len(encoded) == 2


def test_features_do_not_depend_on_company(model):
    family, images = engine(model).model, [picture(i) for i in range(5)]
    assert all(
        torch.equal(together, family.encode_images([image])[0])
        for together, image in zip(family.encode_images(images), images, strict=True)
    )


def test_a_picture_that_cannot_be_encoded_fails_alone(model, monkeypatch):
    made = engine(model)
    encode = made.model.encode_images

    def fragile(images):
        if any(torch.equal(image.pixels, picture(2).pixels) for image in images):
            raise RuntimeError("a picture that breaks the tower")
        return encode(images)

    monkeypatch.setattr(made.model, "encode_images", fragile)
    outputs = run(made, [asked(str(i), prompt(model, 3, picture(i), 4)) for i in range(4)])
    assert [outputs[str(i)][-1].reason for i in range(4)] == ["length", "length", "error", "length"]


def test_a_short_request_is_answered_beside_a_crowd(model):
    """Fifty long requests of another client, with images and answers to come, cost it two steps."""
    made = engine(model, step_tokens=16, max_running=8)
    crowd = [asked(f"c{n}", prompt(model, 20, picture(n), 20, seed=n), tokens=200, client="crowd") for n in range(50)]
    made.submit_all(crowd)
    for _ in range(12):
        made.step()
    made.submit(asked("one", prompt(model, 3, seed=9), tokens=4, client="one"))
    steps, ended = 0, False
    while not ended and steps < 100:
        ended = any(output.id == "one" and output.reason == "length" for output in made.step())
        steps += 1
    assert ended and steps <= 4 + 2, steps


def test_a_full_queue_takes_who_has_little_in_it(model):
    """max_waiting of one client, and every further one finds half of what is left of twice as much."""
    made = engine(model, max_waiting=8)
    case = prompt(model, 4)
    for client, places in (("a", 8), ("b", 4), ("c", 2), ("d", 1)):
        made.submit_all([asked(f"{client}{n}", case, client=client) for n in range(places)])
        with pytest.raises(QueueFull, match=f"{places} requests of this client"):
            made.submit(asked("more", case, client=client))
    made.abort("a0")
    with pytest.raises(QueueFull):
        made.submit_all([asked("e", case, client="e"), asked("more", case, client="a")])
    made.submit(asked("e", case, client="e"))


def test_a_paused_request_goes_on_to_the_same_bits(model, mixed):
    asks, alone = mixed
    made = engine(model, step_tokens=30)
    made.submit_all(asks)
    names = [ask.id for ask in asks]
    for step in range(200):
        if not made.busy:
            break
        paused = [name for name in names[step % 4 :: 4] if name in made.seen] if step % 3 == 0 else []
        made.pause(paused)
        made.check_integrity()
        assert not any(pages for s in made._sequences.values() if s.request.id in paused for pages in s.pages)
        made.step()
        made.resume(names)
    assert not made.busy and same(made.seen, alone)
    made.submit(replace(asks[0], id="again"))
    made.pause(["again", "nobody"])
    assert not made.busy and made.step() == []
    made.abort("again")
    assert [output.reason for output in made.step()] == ["abort"]


@pytest.mark.parametrize("recipe", [None, "pruned"])
def test_the_last_layer_makes_one_row_per_request(model, recipe):
    """Of a prompt nothing but the logits of its end is read from there."""
    rows: list[list[int]] = [[] for _ in model.model.language_model.layers]

    def counted(layer):
        return lambda module, args: rows[layer].append(args[0].numel() // args[0].shape[-1])

    hooks = [
        layer.mlp.register_forward_pre_hook(counted(number))
        for number, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        run(engine(model), [asked(id, prompt(model, 3, picture(1), 12), 1, recipe) for id in "ab"])
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(rows[-1]) == 2 < sum(rows[-2])
