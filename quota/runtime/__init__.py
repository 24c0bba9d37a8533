"""The online half: checkpoints and recipes in, tokens out."""

from quota.runtime import hf  # noqa: F401 - registers the quantization method
from quota.runtime.load import load
from quota.runtime.patch import PatchHandle, patched

__all__ = ["PatchHandle", "load", "patched"]
