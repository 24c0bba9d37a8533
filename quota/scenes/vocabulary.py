"""The closed world of the embedded benchmark: shapes, colours, words, and the prompt in LLaVA-1.5 form."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (232, 200, 30),
    "purple": (140, 60, 170),
    "orange": (238, 128, 24),
    "cyan": (40, 190, 205),
    "black": (30, 30, 34),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = ("a", "b", "c", "d")

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_OTHER_WORDS = (
    "user", "assistant", ":", "?", ".", ",", "top", "left", "right", "bottom", "above", "below", "of", "the", "is", "are", "there", "what", "which",
    "where", "how", "many", "color", "shape", "picture", "in", "this", "object", "objects", "describe", "answer", "with", "letter", "yes", "no",
    "small", "large", "and",
)  # fmt: skip

WORDS: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    *SHAPES,
    *COLORS,
    *dict.fromkeys((*NUMBERS, *LETTERS, *_OTHER_WORDS)),
)

CAPTION_REQUEST = "describe the picture ."
IMAGE_SIZE = 336
PATCH_SIZE = 14
