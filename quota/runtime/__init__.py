"""The online half: checkpoints and recipes in, tokens out."""

from quota.runtime.load import load
from quota.runtime.patch import PatchHandle, patched

__all__ = ["PatchHandle", "load", "patched"]
