"""The model's inputs and answers are those of lmms-eval's own wrappers, bit for bit.

Those wrappers import packages for videos at the top of their files; empty stand-ins serve, because nothing here shows a
video.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import quota.lmms.model as own
from quota.core.errors import UsageError
from quota.lmms.prompts import Wrapper, conversation
from quota.models.qwen2_5_vl import Qwen2_5_VLProcessor

Asked = Callable[[Any, list[str], int], dict[str, list[str]]]
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def watch(seen: list[dict[str, torch.Tensor]], generate: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = args[1] if len(args) > 1 else kwargs
        seen.append({key: given[key].clone() for key in INPUTS if key in given})
        return generate(*args, **kwargs)

    return watched


def compare(built_in: Any, mine: own.Quota, ask: Asked, monkeypatch: pytest.MonkeyPatch, tasks: list[str]) -> None:
    theirs, ours = [], []
    built_in._model.generate = watch(theirs, built_in._model.generate)
    texts = ask(built_in, tasks, 2)
    monkeypatch.setattr(own, "generate", watch(ours, own.generate))
    assert ask(mine, tasks, 2) == texts
    assert len(theirs) == len(ours) == 2 * len(tasks)
    key = [lambda inputs: (inputs["input_ids"].shape[1], inputs["input_ids"].tolist())] * 2
    for a, b in zip(sorted(theirs, key=key[0]), sorted(ours, key=key[1]), strict=True):
        assert set(a) == set(b)
        for name in a:
            assert torch.equal(a[name].to(b[name].dtype), b[name]), name


def test_llava_equals_the_built_in_wrapper(llava_folder: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "decord", VideoReader=None, cpu=None)
    from lmms_eval.models.chat.llava_hf import LlavaHf

    built_in = LlavaHf(str(llava_folder), device="cpu", device_map="cpu", dtype="float32")
    compare(
        built_in,
        own.Quota(pretrained=str(llava_folder)),
        ask,
        monkeypatch,
        ["quota_scenes_choice", "quota_scenes_counting"],
    )


def test_qwen2_5_vl_equals_the_built_in_wrapper(qwen_folder: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper's processor needs torchvision; it gets ours, opened with the wrapper's own arguments. Pictures
    smaller than its limit are enlarged."""
    stand_in(monkeypatch, "decord")
    stand_in(monkeypatch, "torchvision", io=None, transforms=None)
    stand_in(monkeypatch, "torchvision.transforms", InterpolationMode=None)
    monkeypatch.delitem(sys.modules, "qwen_vl_utils", raising=False)
    for name in ("lmms_eval.models.simple.qwen2_5_vl", "lmms_eval.models.chat.qwen2_5_vl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import lmms_eval.models.simple.qwen2_5_vl as simple
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL, process_vision_info

    assert process_vision_info is not None

    class Opened:
        @staticmethod
        def from_pretrained(path: str, **limits: int) -> Any:
            return Qwen2_5_VLProcessor.from_pretrained(path, backend="pil", **limits)

    monkeypatch.setattr(simple, "AutoProcessor", Opened)
    built_in = Qwen2_5_VL(str(qwen_folder), device="cpu", device_map="cpu")
    mine = own.Quota(pretrained=str(qwen_folder), dtype="bfloat16")
    compare(built_in, mine, ask, monkeypatch, ["quota_pages_chart", "quota_pages_document"])


def test_a_checkpoint_with_other_tokens_keeps_its_own_limits(qwen_folder: Path) -> None:
    config = own.Quota(pretrained=str(qwen_folder)).opened()[0].config
    config.vision_config.patch_size = 10
    processor = Qwen2_5_VLProcessor.from_pretrained(qwen_folder, backend="pil")
    wrapper = Wrapper(config, processor)
    assert processor.image_processor.size["longest_edge"] == 16_384 * 28**2
    picture = Image.new("RGB", (123, 77))
    assert wrapper.prepare(picture) is picture
    assert Wrapper(config, processor, (None, 7840)).processor.image_processor.size["longest_edge"] == 7840


def test_limits_that_cannot_be(llava_folder: Path, qwen_folder: Path) -> None:
    with pytest.raises(UsageError, match="min_pixels, max_pixels: expected none for llava"):
        own.Quota(pretrained=str(llava_folder), min_pixels=100).opened()
    with pytest.raises(UsageError, match="min_pixels: expected at most max_pixels"):
        own.Quota(pretrained=str(qwen_folder), min_pixels=2000, max_pixels=1000).opened()


def test_videos_are_refused() -> None:
    with pytest.raises(UsageError, match=r"task clips: expected images and text, got video \(str\)"):
        conversation(
            [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "what ?"}]}],
            "clips",
        )
