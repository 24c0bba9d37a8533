"""`quota import`: a published 4-bit checkpoint as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, check_checkpoint, check_writable, print_json, say


def import_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A compressed-tensors, AutoAWQ or GPTQ checkpoint: a folder or a hub name."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder. It appears only when it is complete.")],
    json: JsonOption = False,
) -> None:
    """Write a published checkpoint of int4 weights as one that quota serves, with a recipe on top where you make one.

    Codes, scales and zeros are taken over, so dequantized weights are equal; nothing is calibrated. Read are weights of
    the supported families in int4, groups of 128 inputs (or a multiple, or one for all), float activations. Refused
    with the reason: other bits, smaller groups, groups of chosen inputs (desc_act, g_idx), and models of which a part
    has both float and int4 linear layers.

    **Example**

        quota import Qwen/Qwen2.5-VL-7B-Instruct-AWQ --out qwen-awq
    """
    check_checkpoint(model, "MODEL")
    check_writable(out)

    from quota.calib.published import import_checkpoint

    manifest = import_checkpoint(model, out)
    if json:
        print_json({"out": str(out), "regime": manifest.scheme.name, "modules": list(manifest.modules)})
        return
    say(f"{out}: {manifest.scheme.name}, parts {', '.join(manifest.modules)}")
