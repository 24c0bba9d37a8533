"""`quota doctor`: what is here, what runs, and why not."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import typer

from quota.cli.shell import JsonOption, print_json, say

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "pydantic", "matplotlib")
_OPTIONAL = ("triton", "flash-attn", "nvidia-ml-py")  # on a machine with an NVIDIA GPU


def _versions(names: Iterable[str]) -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def examine() -> dict[str, Any]:
    """Everything `quota doctor` prints, JSON-able; `problems` lists what stops quota from working."""
    from quota.core.formats import SCHEMES
    from quota.core.version import VERSION
    from quota.eval.machine import cpu, cuda_devices, describe_float_attention, describe_native, op_rows
    from quota.scenes import assets

    packages = _versions(_PACKAGES)
    problems = [
        f"package {name} is missing: pip install -c constraints.txt {name}"
        for name, version in packages.items()
        if version is None
    ]
    document: dict[str, Any] = {
        "quota": VERSION,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu(),
        "packages": packages,
        "optional": _versions(_OPTIONAL),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("QUOTA_")},
    }
    if packages["torch"]:
        import torch

        from quota.runtime.engine.decode import describe

        document["torch_threads"] = torch.get_num_threads()
        document["cuda"] = cuda_devices()
        document["native"] = describe_native()
        document["float_attention"] = describe_float_attention()
        document["decode"] = {
            name: describe(torch.device(name)) for name in ("cpu", *(f"cuda:{i}" for i in range(len(document["cuda"]))))
        }
        document["ops"], wrong = op_rows()
        problems += wrong
    document["schemes"] = [
        {
            "name": scheme.name,
            "formats": scheme.words(),
            "calibrated by": ", ".join(scheme.methods),
        }
        for scheme in SCHEMES.values()
    ]
    document["embedded"] = {
        family: (assets.folder_of(family) / "checkpoint" / "config.json").is_file() for family in assets.FAMILIES
    }
    document["problems"] = problems
    return document


def doctor(json: JsonOption = False) -> None:
    """Say what is installed, which implementation each op uses, and why others are not.

    A bug report starts with `quota doctor`. Exit status 1 when something needed is missing; the native library is not
    needed, only faster.

    **Examples**

        quota doctor

        QUOTA_IMPL=w4a4_linear=ref quota doctor --json
    """
    document = examine()
    if json:
        print_json(document)
    else:
        _print(document)
    if document["problems"]:
        raise typer.Exit(1)


def _table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    lines = [{key: key for key in rows[0]}, *rows]
    widths = [max(len(str(line[key])) for line in lines) for key in rows[0]]
    for line in lines:
        say("  " + "  ".join(str(v).ljust(w) for v, w in zip(line.values(), widths, strict=True)).rstrip())


def _print(document: dict[str, Any]) -> None:
    cpu = document["cpu"]
    say(f"quota {document['quota']}   python {document['python']}   {document['platform']}")
    say(f"cpu   {cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'no vector features known'}")
    say("packages   " + "   ".join(f"{k} {v or 'MISSING'}" for k, v in document["packages"].items()))
    say("optional   " + "   ".join(f"{k} {v or 'not installed'}" for k, v in document["optional"].items()))
    for name, value in document["environment"].items():
        say(f"{name}={value}")
    for number, device in enumerate(document.get("cuda", [])):
        say(
            f"cuda:{number}   {device['name']}, compute capability {device['capability']},"
            f" {device['memory_bytes'] / 1e9:.0f} GB"
        )
    native = document.get("native")
    if native:
        say(f"native library   {native}")
        say(f"float attention   {document['float_attention']}")
        for name, how in document["decode"].items():
            say(f"serving on {name}   {how}")
    _table(document["schemes"])
    _table(document.get("ops", []))
    found = document["embedded"]
    say("embedded models   " + ", ".join(f"{name} {'here' if there else 'not here'}" for name, there in found.items()))
    for problem in document["problems"]:
        say(f"PROBLEM   {problem}")
    say("all needed parts are here" if not document["problems"] else f"{len(document['problems'])} problem(s)")
