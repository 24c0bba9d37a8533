"""Joint quantization and visual-token pruning of vision-language models.

`quota.LLM` answers many prompts at once through the engine, `quota.load` opens a checkpoint as a transformers model,
`quota.patched` runs any supported transformers model under a recipe. Importing this package imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quota.core.version import VERSION

if TYPE_CHECKING:
    from quota.runtime.engine import SamplingParams
    from quota.runtime.llm import LLM
    from quota.runtime.load import load
    from quota.runtime.patch import patched

__version__ = VERSION
__all__ = ["LLM", "SamplingParams", "__version__", "load", "patched"]

_LAZY = {
    "LLM": "quota.runtime.llm",
    "SamplingParams": "quota.runtime.engine",
    "load": "quota.runtime.load",
    "patched": "quota.runtime.patch",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'quota' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
