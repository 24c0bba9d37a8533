"""Prompts for tiny models, and driving an engine by hand."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quota.core.formats import DEFAULT, Scheme
from quota.models import find_family
from quota.models.images import ImageInput
from quota.models.quantize import text_scheme
from quota.models.rtn import quantize_rtn
from quota.runtime.engine import Engine, EngineConfig, Output, Prompt, Request, SamplingParams
from quota.runtime.engine.kv_storage import block_bytes
from quota.runtime.patch import patched
from tests.pixtral import pixtral_ids, pixtral_pixels
from tests.prune.recipes import recipe_for, reference_of
from tests.tiled import tile_pixels, tiles_of
from tests.tiny import IMAGE_TOKEN, KEY_BIASED, QWEN_IDS, TILED, TINY


class Watched(Engine):
    """Remembers the logits of every token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[Any]] = {}

    def _choose(self, sequence: Any, logits: Any) -> None:
        self.seen.setdefault(sequence.request.id, []).append(logits.values.copy())
        super()._choose(sequence, logits)


def picture(seed: int, size: int = 56) -> ImageInput:
    return ImageInput(torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)))


def prompt(model: Any, *parts: int | ImageInput, seed: int = 0, selection: int | None = None) -> Prompt:
    """parts: a number of random words, or a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [1]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 119, (part,), generator=generator).tolist()
        else:
            ids += [IMAGE_TOKEN] * find_family(model).image_tokens(part)
    return Prompt(ids, [part for part in parts if not isinstance(part, int)], selection)


def patches(rows: int, columns: int, seed: int = 0) -> ImageInput:
    """A picture of Qwen2.5-VL with rows x columns patches, four of which make a visual token."""
    return ImageInput(
        torch.randn(rows * columns, 96, generator=torch.Generator().manual_seed(seed)), (1, rows, columns)
    )


def qwen_prompt(*parts: int | ImageInput, seed: int = 0, selection: int | None = None) -> Prompt:
    """As `prompt`, with the markers Qwen2.5-VL puts around a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [1]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 119, (part,), generator=generator).tolist()
        else:
            ids += [
                QWEN_IDS["vision_start_token_id"],
                *[IMAGE_TOKEN] * (len(part.pixels) // 4),
                QWEN_IDS["vision_end_token_id"],
            ]
    return Prompt(ids, [part for part in parts if not isinstance(part, int)], selection)


def sized(model: Any, rows: int, columns: int, seed: int = 0) -> ImageInput:
    """A picture for a Pixtral tower of as many visual tokens as `patches` has."""
    merge, generator = find_family(model).merge, torch.Generator().manual_seed(seed)
    grid = rows // 2 * merge, columns // 2 * merge
    return ImageInput(torch.randn(3, 4 * grid[0], 4 * grid[1], generator=generator), (1, *grid))


def pixtral_prompt(model: Any, *parts: int | ImageInput, seed: int = 0) -> Prompt:
    """As `prompt`, with a break token behind every row of a picture and an end token behind the last."""
    generator, merge = torch.Generator().manual_seed(seed), find_family(model).merge
    ids: list[int] = [1]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 119, (part,), generator=generator).tolist()
        else:
            assert part.grid is not None
            ids += pixtral_ids(part.grid[1] // merge, part.grid[2] // merge)
    return Prompt(ids, [part for part in parts if not isinstance(part, int)])


def recipes(model: Any) -> dict[str, Any]:
    family = find_family(model).name
    fields = {"reference": "per_image"} if find_family(model).visual_tokens is None else {}
    return {
        "pruned": recipe_for(model, **reference_of(family)),
        "compact": recipe_for(model, **{**fields, "position_policy": "compact"}),
    }


def engine(
    model: Any, pages: int = 2000, default: str | None = "pruned", tokenizer: Any = None, **config: Any
) -> Watched:
    """A pool of `pages` units."""
    places = config.get("page_tokens", 4)
    family = find_family(model)
    size = block_bytes(places, family.kv_heads, family.head_dim, text_scheme(model).kv)
    options = EngineConfig(
        kv_bytes=pages * size, page_tokens=places, **{k: v for k, v in config.items() if k != "page_tokens"}
    )
    return Watched(model, tokenizer=tokenizer, recipes=recipes(model), default=default, config=options)


def run(engine: Engine, requests: Iterable[Request], check: bool = True, most: int = 2000) -> dict[str, list[Output]]:
    """Submit all, step to the end; outputs per request."""
    outputs: dict[str, list[Output]] = {}
    for request in requests:
        engine.submit(request)
        outputs[request.id] = []
    for _ in range(most):
        if not engine.busy:
            break
        for output in engine.step():
            outputs[output.id].append(output)
        if check:
            engine.check_integrity()
    assert not engine.busy
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def asked(
    id: str,
    prompt: Prompt,
    tokens: int = 6,
    recipe: Any = "default",
    keep: float | None = None,
    client: str = "",
    **sampling: Any,
) -> Request:
    chosen = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, **sampling})
    return Request(id, prompt, chosen, recipe, keep, client=client)


def pixels_of(model: Any, prompt: Prompt) -> dict[str, Tensor]:
    """The model's inputs for the pictures of a prompt."""
    family = find_family(model).name
    if model.config.vision_config.model_type == "pixtral":
        return pixtral_pixels([image.pixels for image in prompt.images]) if prompt.images else {}
    ids = torch.tensor([list(prompt.ids)])
    more: dict[str, Tensor] = {}
    if family == "paligemma":
        more = {"token_type_ids": torch.zeros_like(ids)}
    elif family.startswith("qwen"):
        more = {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
    if not prompt.images:
        return more
    if family in TILED:
        return tile_pixels(prompt.images)
    if find_family(model).visual_tokens is not None:
        return {**more, "pixel_values": torch.stack([image.pixels for image in prompt.images])}
    return {
        **more,
        "pixel_values": torch.cat([image.pixels for image in prompt.images]),
        "image_grid_thw": torch.tensor([i.grid for i in prompt.images]),
    }


@torch.no_grad()
def generated(model: Any, prompt: Prompt, tokens: int = 6) -> list[int]:
    """What transformers' generate answers, greedy, exactly `tokens` tokens."""
    ids = torch.tensor([list(prompt.ids)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels_of(model, prompt)}
    out = model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=0, eos_token_id=None, pad_token_id=0, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def assert_serves_as_generate(model: Any, prompts: Iterable[Prompt], recipe: str | None) -> None:
    """The engine, all prompts together and cut into pieces, answers what `generate` does; recipe: one of `recipes`."""
    cases = {str(number): one for number, one in enumerate(prompts)}
    with patched(model, recipes(model)[recipe]) if recipe is not None else nullcontext():
        want = {name: generated(model, one) for name, one in cases.items()}
    made = engine(model, default=recipe, step_tokens=7)
    together = run(made, [asked(name, one) for name, one in cases.items()])
    assert {name: tokens(out) for name, out in together.items()} == want


def logits(model: Any, requests: Iterable[Request], **options: Any) -> Watched:
    """An engine that has answered the requests."""
    made = engine(model, **options)
    run(made, requests)
    return made


def same(a: dict[str, list[Any]], b: dict[str, list[Any]]) -> bool:
    """Whether two engines saw the same logits, bit for bit."""
    return a.keys() == b.keys() and all(
        len(a[k]) == len(b[k]) and all((x == y).all() for x, y in zip(a[k], b[k], strict=True)) for k in a
    )


@cache
def quantized(family: str, scheme: Scheme = DEFAULT) -> Any:
    """A tiny quantized model of a family; key biases as large as trained ones where the family has them."""
    return quantize_rtn(TINY[family][0](**({"key_bias": 800} if family in KEY_BIASED else {})), scheme=scheme)


@cache
def cases(family: str) -> dict[str, Prompt]:
    """Prompts of every kind; where resolution is dynamic, with images of several sizes and neighbours."""
    model = quantized(family)
    if find_family(model).visual_tokens is not None:
        a, b = picture(1), picture(2)
        return {
            "text": prompt(model, 9, seed=1),
            "one picture": prompt(model, 3, a, 5, seed=2),
            "no text after": prompt(model, 4, b, seed=3),
            "two pictures": prompt(model, 2, a, 3, b, 6, seed=4),
            "picture first": prompt(model, b, 7, seed=5),
            "long": prompt(model, 40, a, 20, seed=6),
        }
    if family in TILED:  # a square, a wide and a tall one, whose grids lose rows or columns of padding
        a, b, c = (tiles_of(model, *size, seed=1) for size in ((56, 50), (20, 100), (90, 30)))
        return {
            "text": prompt(model, 9, seed=1),
            "one picture": prompt(model, 3, a, 5, seed=2),
            "no text after": prompt(model, 4, b, seed=3),
            "two pictures": prompt(model, 2, a, 3, b, 6, seed=4),
            "picture first": prompt(model, c, 1, b, 7, seed=5),
            "long": prompt(model, 40, a, 20, seed=6),
        }
    pixtral = family == "mistral3"
    shown, made = (partial(sized, model), partial(pixtral_prompt, model)) if pixtral else (patches, qwen_prompt)
    a, b, c = shown(8, 8, 1), shown(4, 6, 2), shown(2, 14, 3)
    return {
        "text": made(9, seed=1),
        "one picture": made(3, a, 5, seed=2),
        "no text after": made(4, b, seed=3),
        "two pictures": made(2, a, 3, b, 6, seed=4),
        "picture first": made(c, b, 7, seed=5),
        "long": made(40, a, 20, seed=6),
    }


@cache
def mixed_requests(family: str, scheme: Scheme = DEFAULT) -> tuple[list[Request], dict[str, list[Any]]]:
    """Requests of every kind, and the logits each has alone."""
    found = cases(family)
    asks = [asked(name, case, tokens=8) for name, case in found.items()]
    asks.append(asked("unpruned", found["long"], tokens=8, recipe=None))
    asks.append(asked("tighter", found["two pictures"], tokens=8, recipe="compact", keep=0.2))
    asks.append(asked("sampled", found["picture first"], tokens=8, temperature=1.2, top_p=0.9, top_k=50, seed=7))
    alone: dict[str, list[Any]] = {}
    for ask in asks:
        alone.update(logits(quantized(family, scheme), [ask]).seen)
    return asks, alone
