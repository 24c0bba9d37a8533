"""Training sees exactly what single-question inference does, and continues after a stop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.core.errors import UsageError
from quota.scenes import generate as g
from quota.scenes.model import build_config, build_model, build_processor
from quota.scenes.vocabulary import WORDS
from tools.scenes import llava as t
from tools.scenes.train import main, train
from tools.scenes.training import Stage, block_mask

TINY = Stage("tiny", 3, 168, 2, 1e-3, questions_per_task=1, caption_share=1.0, dense_weight=0.1)


def test_tokenizer_reads_text_as_training_does() -> None:
    tokenizer = build_processor(168).tokenizer
    for q in g.questions(g.scene("train", 3), per_task=3):
        assert tokenizer(q.text.upper()).input_ids == [t._IDS["<s>"], *t.encode(q.text)]
        assert "<unk>" not in tokenizer.decode(t.encode(f"{q.text} {q.answer}"))


def test_packed_segments_equal_separate_questions() -> None:
    """Logits of a packed segment equal those of the processor's own single prompt: same picture tensor, ids, positions
    and mask."""
    model = build_model(build_config(168, width=64, layers=2)).eval()
    processor = build_processor(168)
    s = g.scene("train", 1, 168)
    batch = t.collate([s], TINY)
    segments = t.segments_of(s, TINY, s.seed("training questions"))
    texts = [" ".join(WORDS[i] for i in prompt[:-2]) for prompt, _ in segments]  # without "assistant :"
    assert len(texts) > 4
    with torch.no_grad():
        packed = _packed_hidden(model, batch)
        row = batch["segment"][0]
        for number, text in enumerate(texts, start=1):
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            inputs = processor(images=[g.draw(s)], text=[prompt], return_tensors="pt")
            alone = model(**inputs).logits[0, -1]
            last_prompt = len(segments[number - 1][0]) - 1
            position = int((row == number).nonzero()[last_prompt])
            torch.testing.assert_close(packed[position], alone, atol=2e-4, rtol=2e-4)


def _packed_hidden(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [T, vocabulary] of the packed text tokens."""
    kept: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_hook(lambda m, a, out: kept.append(out.last_hidden_state))
    t.forward(model, t.DenseHead(64), batch, TINY, amp=False)
    hook.remove()
    text = batch["ids"].shape[1]
    return model.lm_head(kept[0][0, -text:])


def test_a_segment_never_sees_another() -> None:
    mask = block_mask(torch.tensor([[1, 1, 2, 2, -1]]), prefix=3)[0, 0] == 0
    assert mask[3:5, :3].all() and mask[5:7, :3].all()
    assert not mask[5:7, 3:5].any() and not mask[3:5, 5:].any()
    assert torch.equal(mask[:3, :3], torch.ones(3, 3).tril().bool())


@pytest.mark.filterwarnings("ignore")
def test_stopped_training_continues_to_the_same_weights(tmp_path) -> None:
    first = replace(TINY, name="one", steps=2, questions_per_task=0, language=False)
    schedule = (first, replace(TINY, steps=2))
    options = {"width": 64, "layers": 1, "seed": 0, "device": "cpu", "amp": False}
    train(tmp_path / "whole", schedule=schedule, **options)
    train(tmp_path / "parts", schedule=schedule[:1], **options)
    train(tmp_path / "parts", schedule=schedule, **options)
    whole, parts = (torch.load(tmp_path / d / "training.pt", weights_only=True) for d in ("whole", "parts"))
    assert whole["stage"] == parts["stage"] == 1 and whole["step"] == 2
    for name, tensor in whole["model"].items():
        # Adam's first steps have the size of the learning rate whatever the gradient: rounding noise can turn one
        # (5e-6) around.
        torch.testing.assert_close(parts["model"][name], tensor, atol=5e-5, rtol=0)


def test_a_folder_of_the_users_is_not_trained_in(tmp_path, monkeypatch) -> None:
    (tmp_path / "schedule.json").write_text("mine")
    with pytest.raises(UsageError, match=r"holds schedule\.json"):
        train(tmp_path, width=64, layers=1, seed=0, device="cpu", amp=False, schedule=())
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"error: .*schedule\.json"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"] and (
        tmp_path / "schedule.json"
    ).read_text() == "mine"
