"""Where things are inside the supported architectures."""

from quota.arch.llava import ArchSpec, canonical_key, find_arch, fingerprint, model_fingerprint, submodule

__all__ = ["ArchSpec", "canonical_key", "find_arch", "fingerprint", "model_fingerprint", "submodule"]
