"""`quota run`: one question about images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import (
    DeviceOption,
    DtypeOption,
    FloatType,
    JsonOption,
    check_checkpoint,
    check_output,
    print_json,
    say,
)
from quota.core import images
from quota.core.errors import UsageError


def run(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Quantized or float checkpoint: a folder or a hub name.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Image file; repeat for several, leave out for none.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Prune visual tokens by this recipe.")] = None,
    show: Annotated[
        Path | None,
        typer.Option("--show", help="Write a PNG: which tokens each pruning layer kept, over the images."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = FloatType.float32,
    json: JsonOption = False,
) -> None:
    """Ask one question about an image (greedy decoding).

    **Examples**

        quota run demo-out/quantized --image photo.jpg --prompt "what color is the star ?"

        quota run demo-out/quantized --recipe demo-out/recipe.json --image photo.jpg -p "describe the picture ." --show
        kept.png

        quota run llava-w4a4kv4 --device cuda --dtype float16 --image photo.jpg -p "What is unusual about this image?"
    """
    check_checkpoint(checkpoint)
    if not prompt.strip():
        raise UsageError("--prompt: expected a question, got nothing")
    if show is not None:
        if recipe is None:
            raise UsageError("--show: needs --recipe; without one every token is kept")
        if not image:
            raise UsageError("--show: needs --image; there is no image to draw on")
        check_output(show, "--show")
    opened = [images.open_file(path, name="--image") for path in image or []]

    import torch

    from quota.eval.asking import ask
    from quota.runtime.load import load_model

    model, processor = load_model(checkpoint, recipe, device, getattr(torch, dtype.value))
    answer = ask(model, processor, prompt, opened, max_new_tokens=max_new_tokens)
    if show is not None:
        from quota.report.overlay import save_overlay

        save_overlay(show, answer.pictures, answer.kept_visual(), answer.grids)
    if json:
        print_json({"text": answer.text, **answer.figures(), "overlay": str(show) if show else None})
        return
    say(answer.text)
    figures = answer.figures()
    typer.echo(
        f"{figures['visual_tokens']} visual tokens, {figures['average_visual_tokens']:.1f} on average over layers; "
        f"first token {figures['prefill_ms']:.0f} ms; KV cache {figures['kv_bytes'] / 1e3:.1f} kB",
        err=True,
    )
    if show is not None:
        typer.echo(f"kept tokens: {show}", err=True)
