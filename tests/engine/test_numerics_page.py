"""The program that docs/numerics.md shows as the claim, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.engine.asking import asked, engine, picture, prompt, run

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"


def test_the_claim_on_the_page_holds(model):
    prompts = {name: prompt(model, 3 + i, picture(i), 5 + i, seed=i) for i, name in enumerate("abc")}

    def logits_of(*names: str) -> dict[str, bytes]:
        made = engine(model)
        run(made, [asked(name, prompts[name]) for name in names])
        return {name: b"".join(step.tobytes() for step in made.seen[name]) for name in names}

    (claim,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert "assert" in claim
    exec(claim, {"logits_of": logits_of})
