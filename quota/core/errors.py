"""Every error a person can meet. Messages say which field or tensor, what was expected, what was found, and the
remedy."""

from __future__ import annotations


class QuotaError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(QuotaError):
    """A call, flag or environment variable that cannot be obeyed."""


class BuildError(QuotaError):
    """A native library that was asked for cannot be had."""


class CheckpointError(QuotaError):
    """A checkpoint that is missing, truncated, tampered with or of another shape."""


class RecipeError(QuotaError):
    """A recipe that is malformed or belongs to another model."""


class SampleError(QuotaError):
    """A samples file or image that cannot be read."""


class ImageError(SampleError):
    """An image that is refused: it cannot be read, or is over a limit (`too_large`)."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large
