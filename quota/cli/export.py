"""`quota export`: a quantized checkpoint for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, check_checkpoint, check_writable, print_json, say


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder that `quota calibrate` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder. It appears only when it is complete.")],
    to: Annotated[str, typer.Option("--to", help="Whose format: vllm (compressed-tensors).")] = "vllm",
    json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint as compressed-tensors, under the hub's names of tensors.

    Schemes w8a8, fp8, w4a16 and w4a16kv4 (its 4-bit cache stays behind). The weights are the checkpoint's codes and
    scales, so what the reader makes of them are the same numbers. Groups of 128 inputs become smaller ones where a
    width is no multiple of 128. Refused with the reason: w4a4kv4, whose transforms run before every linear; nvfp4 and
    mxfp4; weights that AWQ left with a scale of their input. Recipes stay with quota: other engines prune nothing
    inside the language model.

    **Example**

        quota export llava-w8a8 --to vllm --out llava-w8a8-vllm
    """
    check_checkpoint(checkpoint)
    check_writable(out)

    from quota.runtime.export import export as export_checkpoint

    written = export_checkpoint(checkpoint, out, to)
    if json:
        print_json({"out": str(out), "quantization_config": written})
        return
    say(f"{out}: {written['format']}, {len(written['ignore'])} linear layers stay float")
