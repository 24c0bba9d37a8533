"""Crowds: pure, splits apart, answers that follow from what is drawn, and nothing of it changes what the older kinds
show and ask.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from quota.scenes import crowd_questions as q
from quota.scenes import crowds
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.vocabulary import COLORS, NUMBERS, SIGN_WORDS


def content(c):
    return c.items, c.signs


def test_a_crowd_is_a_pure_function_of_split_and_index():
    first, again = crowds.crowd("test", 3), crowds.crowd("test", 3)
    assert first == again and np.array_equal(np.asarray(crowds.draw(first)), np.asarray(crowds.draw(again)))
    assert q.questions(first) == q.questions(again) and crowds.change("test", 3) == crowds.change("test", 3)
    with pytest.raises(ValueError, match="split"):
        crowds.crowd("validation", 0)


def test_splits_cannot_overlap_in_one_picture_or_two():
    found = {}
    for split in g.SPLITS:
        pairs = [crowds.change(split, i) for i in range(40)]
        found[split] = {content(c) for pair in pairs for c in (pair.before, pair.after)}
        found[split] |= {content(crowds.crowd(split, i)) for i in range(40)}
        assert all(g.split_of(("crowd", *one)) == split for one in found[split])
    assert not found["train"] & found["test"] and not found["calibration"] & found["test"]


def test_ten_to_twenty_objects_apart_from_each_other_and_from_the_middle_lines():
    counts = []
    for i in range(60):
        c = crowds.crowd("train", i)
        counts.append(len(c.items))
        boxes = [(item.x, item.y, item.radius, item.radius) for item in c.items]
        boxes += [(sign.x, sign.y, *sign.half) for sign in c.signs]
        for at, (x, y, w, h) in enumerate(boxes):
            assert w <= x <= 336 - w and h <= y <= 336 - h and min(abs(x - 168), abs(y - 168)) >= 8
            assert all(abs(x - a) > w + u or abs(y - b) > h + v for a, b, u, v in boxes[at + 1 :])
        assert len({item.kind for item in c.items}) == len(c.items) == len(set(c.names.values()))
    assert min(counts) >= 10 and max(counts) == 20


def named(c, name):
    """The objects that a description fits."""
    wanted = set(name.split()) - {"object", "objects"}
    return [item for item in c.items if wanted <= set(item.kind)]


def one(c, name):
    (found,) = named(c, name)
    return found


def check(c, asked):
    text = asked.text.removesuffix("?")
    if asked.task == "existence":
        assert asked.answer == ("yes" if named(c, text.removeprefix("is there a ")) else "no")
    elif asked.task == "color":
        assert one(c, text.removeprefix("what color is the ")).color == asked.answer
    elif asked.task == "shape":
        assert one(c, text.removeprefix("what shape is the ")).shape == asked.answer
    elif asked.task == "texture":
        assert one(c, text.removeprefix("what is the pattern of the ")).texture == asked.answer
    elif asked.task == "size":
        assert one(c, text.removeprefix("is the ").removesuffix(" small or large")).size == asked.answer
    elif asked.task == "counting":
        assert NUMBERS[len(named(c, text.removeprefix("how many ").removesuffix(" are there")))] == asked.answer
    elif asked.task == "position":
        assert c.quadrant(one(c, text.removeprefix("where is the "))) == asked.answer
    elif asked.task == "choice":
        options = text.split("? ")[1].replace(" answer with the letter.", "").split()
        letters = {letter.rstrip("."): word for letter, word in zip(options[::2], options[1::2], strict=True)}
        assert one(c, text.split("?")[0].removeprefix("what color is the ")).color == letters[asked.answer]
    elif asked.task == "extreme":
        way, names = text.removeprefix("which is farthest ").split(": the ")
        a, rest = names.split(", the ")
        three = [one(c, name) for name in (a, *rest.split(" or the "))]
        key = {"left": lambda o: o.x, "right": lambda o: -o.x, "up": lambda o: o.y, "down": lambda o: -o.y}[way]
        best, second = sorted(three, key=key)[:2]
        assert best is one(c, asked.answer) and abs(key(best) - key(second)) >= 20
    elif asked.task == "relation":
        first, over = text.removeprefix("is the ").split(" and ")
        beside = next(word for word in (" left of the ", " right of the ") if word in first)
        a, b = (one(c, name) for name in first.split(beside))
        way, name = over.split(" the ")
        d = one(c, name)
        true = (a.x < b.x) == ("left" in beside) and (a.y < d.y) == (way == "above")
        assert asked.answer == ("yes" if true else "no")
    elif asked.task == "nearest":
        check_nearest(c, one(c, text.removeprefix("which object is nearest to the ")), asked.answer)
    elif asked.task in ("reading", "sign_there"):
        words, colors = {s.word: s for s in c.signs}, {s.color: s for s in c.signs}
        if asked.task == "sign_there":
            assert asked.answer == ("yes" if text.removeprefix("is there a sign that says ") in words else "no")
        elif text.startswith("what does"):
            assert colors[text.split()[3]].word == asked.answer
        elif text.startswith("what color"):
            assert words[text.split()[-1]].color == asked.answer
        elif text.startswith("where"):
            assert c.quadrant(words[text.split()[-1]]) == asked.answer
        else:
            check_nearest(c, words[text.split()[-1]], asked.answer)
    else:
        raise AssertionError(asked.task)


def check_nearest(c, thing, answer):
    distance = sorted((math.hypot(o.x - thing.x, o.y - thing.y), o.kind) for o in c.items if o is not thing)
    assert distance[0][1] == one(c, answer).kind and distance[1][0] >= 1.3 * distance[0][0]


def test_answers_follow_from_what_is_drawn():
    seen = Counter()
    for i in range(60):
        c = crowds.crowd("test", i)
        for dialogue in q.questions(c):
            seen[dialogue.task] += 1
            if dialogue.task == "follow_up":
                check(c, dialogue.turns[0])
                about = one(c, dialogue.turns[0].answer)
                for turn in dialogue.turns[1:]:
                    asked = next(w for w in ("pattern", "small or large", "where") if w in turn.text)
                    told = {"pattern": about.texture, "small or large": about.size, "where": c.quadrant(about)}
                    assert turn.answer == told[asked]
            else:
                check(c, dialogue.turns[0])
    assert set(seen) == set(q.TASKS) and min(seen.values()) > 20


def test_answers_cannot_be_guessed_from_the_question():
    answers = {task: Counter() for task in q.TASKS}
    for i in range(200):
        for dialogue in q.questions(crowds.crowd("train", i)):
            answers[dialogue.task][dialogue.turns[-1].answer] += 1
    for task in ("existence", "relation", "sign_there", "size"):
        assert max(answers[task].values()) < 0.6 * answers[task].total(), (task, answers[task])
    for task in ("color", "shape", "counting", "extreme", "nearest", "choice", "texture", "position"):
        assert max(answers[task].values()) < 0.4 * answers[task].total(), (task, answers[task])


def test_a_change_is_what_differs():
    seen = Counter()
    for i in range(40):
        pair = crowds.change("train", i)
        before, after = set(pair.before.items), set(pair.after.items)
        gone, new = before - after, after - before
        seen[pair.what] += 1
        name = pair.said.removeprefix("the ").split(" is gone")[0].split(" was added")[0].split(" became")[0]
        if pair.what == "gone":
            assert (len(gone), len(new)) == (1, 0) and one(pair.before, name) in gone
        elif pair.what == "added":
            assert (len(gone), len(new)) == (0, 1) and one(pair.after, name) in new
        else:
            (old,), (now,) = gone, new
            assert one(pair.before, name) == old and getattr(now, pair.what) == pair.said.split()[-1]
            assert (old.x, old.y, old.radius) == (now.x, now.y, now.radius)
        assert q.change_question(pair).answer == pair.said
    assert set(seen) == set(crowds.CHANGES)


def test_labels_of_patches():
    for i in range(10):
        c = crowds.crowd("train", i)
        found = crowds.patch_labels(c)
        assert all(len(labels) == 576 for labels in found.values())
        for item in c.items:
            at = int(item.y // 14) * 24 + int(item.x // 14)
            assert (
                tuple(COLORS)[found["color"][at]] == item.color
                and crowds.TEXTURES[found["texture"][at]] == item.texture
            )
        assert {SIGN_WORDS[n] for n in found["word"][found["word"] >= 0]} == {sign.word for sign in c.signs}


def test_the_older_kinds_show_and_ask_what_they_did():
    """The embedded checkpoints were trained on these very contents, and every published table was measured on them."""
    digest = hashlib.sha256()
    for split in g.SPLITS:
        for i in range(10):
            digest.update(repr((g.scene(split, i), g.questions(g.scene(split, i)))).encode())
            for kind in k.PAGES:
                digest.update(repr((k.page(kind, split, i), k.questions(kind, split, i))).encode())
    assert digest.hexdigest() == "8376fc3f7da53a6c079978b3c5f2b584635e0d3d8ec33cafbd3d77abdafa9c14"
