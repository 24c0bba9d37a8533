"""How well a training run answers and describes held-out images: `python -m tools.pretrained.evaluate RUN --parts
PARTS`.

Questions count as right when the whole greedy answer is (each turn of a dialogue, given the right ones before it).
Captions are written greedily and judged by `quota.scenes.captions`. --export FILE also writes the deltas reached, with
the digest of the checkpoint that they make.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from quota.scenes import captions, crowds
from quota.scenes import generate as g
from quota.scenes.vocabulary import CAPTION_REQUEST
from tools.pretrained import deltas, parts
from tools.pretrained.build import tensor_digest
from tools.pretrained.lessons import CAPTION, Segment, natural, pixels
from tools.pretrained.train import Plan, Run

_LONGEST = 400


@torch.no_grad()
def write_caption(run: Run, image: Any) -> str:
    """The greedy answer to "describe the picture." with the weights the run holds."""
    student, prompts = run.student, run.prompts
    student.language.config._attn_implementation = "sdpa"
    packed = prompts.pack((Segment(CAPTION, ((natural(CAPTION_REQUEST), ""),)),))
    asked = packed.ids[:-1]  # without the end of the empty answer
    visual = student.projector(student.features(pixels((image,))))[0]
    embeds = torch.cat([student.words[prompts.before], visual, student.words[asked]])[None]
    cache: Any = None
    said: list[int] = []
    while len(said) < _LONGEST:
        out = student.language(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, int((out.last_hidden_state[0, -1] @ student.words.T).argmax())
        if token == int(packed.ids[-1]):
            break
        said.append(token)
        embeds = student.words[token][None, None]
    student.language.config._attn_implementation = "packed"
    return prompts.text(said)


def caption_scores(run: Run, count: int) -> dict[str, Any]:
    """`count` held-out crowds and as many scenes: figures by kind, with one caption to read."""
    found: dict[str, Any] = {}
    drawn: dict[str, Any] = {
        "crowd": lambda i: (c := crowds.crowd("test", 10_000 + i), crowds.draw(c)),
        "scene": lambda i: (s := g.scene("test", 10_000 + i), g.draw(s)),
    }
    for kind, make in drawn.items():
        total, text = captions.CaptionScore(), ""
        for i in range(count):
            drawn_from, image = make(i)
            text = write_caption(run, image)
            total += captions.score(text, captions.truth(drawn_from))
        figures = {name: round(100 * getattr(total, name), 1) for name in ("precision", "recall", "hallucination")}
        found[kind] = {**figures, "images": count, "objects": total.there, "said": total.said, "last": text}
    return found


def export(run: Run, wheels: Path, out: Path) -> str:
    """Write the deltas of the weights that the run holds; returns the digest of their checkpoint."""
    state = deltas.rounded(run.student.projector, dict(run.parameters))
    how_far = {"dense": str(run.dense), "steps": str(run.step)}
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "deltas.safetensors"
        deltas.write(draft, state, **how_far)
        model, _ = parts.assemble(parts.fetch(wheels))
        deltas.apply(model, draft)
    digest = tensor_digest(model)
    deltas.write(out, state, digest=digest, **how_far)
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of tools.pretrained.train; its state is read, not changed")
    parser.add_argument("--parts", type=Path, required=True, help="checkpoint of tools.pretrained.build --untrained")
    parser.add_argument("--lessons", type=int, default=200, help="held-out lessons to ask about (default %(default)s)")
    parser.add_argument(
        "--captions", type=int, default=20, help="images of each kind to describe (default %(default)s)"
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the deltas here")
    parser.add_argument("--wheels", type=Path, help="with --export: the wheels/ folder of tools.pretrained.build")
    args = parser.parse_args()
    if args.export and not args.wheels:
        parser.error("--export: expected --wheels beside it")
    run = Run(args.run, args.parts, Plan(), None)
    run.use_mean()
    report: dict[str, Any] = {"dense": run.dense, "steps": run.step}
    if args.export:
        report["digest"] = export(run, args.wheels, args.export)
    if args.lessons:
        report["questions"] = run.evaluate(args.lessons)
    if args.captions:
        report["captions"] = caption_scores(run, args.captions)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
