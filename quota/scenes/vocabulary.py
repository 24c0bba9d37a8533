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
    "user",
    "assistant",
    ":",
    "?",
    ".",
    ",",
    "top",
    "left",
    "right",
    "bottom",
    "above",
    "below",
    "of",
    "the",
    "is",
    "are",
    "there",
    "what",
    "which",
    "where",
    "how",
    "many",
    "color",
    "shape",
    "picture",
    "in",
    "this",
    "object",
    "objects",
    "describe",
    "answer",
    "with",
    "letter",
    "yes",
    "no",
    "small",
    "large",
    "and",
)

WORDS: tuple[str, ...] = (*SPECIAL_TOKENS, *SHAPES, *COLORS, *dict.fromkeys((*NUMBERS, *LETTERS, *_OTHER_WORDS)))

CAPTION_REQUEST = "describe the picture ."
IMAGE_SIZE = 336
PATCH_SIZE = 14

# -- the Qwen2.5-VL model also reads text: rendered words and digits, tables, bar charts, and plain statements
# ----------------------------
SIGN_WORDS = ("open", "closed", "exit", "stop", "sale", "taxi", "cafe", "bank", "hotel", "park", "music", "school")
ITEMS = ("bread", "fish", "milk", "tea", "rice", "salt", "corn", "cake", "soup", "plum")
COLUMNS = ("price", "weight", "count")
READABLE = (*SIGN_WORDS, *ITEMS, *COLUMNS, "item")
DIGITS = tuple(str(n) for n in range(10))  # drawn; the model answers with NUMBERS

QWEN_SPECIAL_TOKENS = (
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_READING_WORDS = (
    "word",
    "sign",
    "says",
    "on",
    "bar",
    "value",
    "highest",
    "lowest",
    "read",
    "plus",
    "minus",
    "more",
    "than",
    "or",
    "has",
    "row",
    "rows",
    "column",
    "it",
    "that",
    "not",
    "now",
    "text",
    "say",
    "does",
)
QWEN_WORDS: tuple[str, ...] = (
    *QWEN_SPECIAL_TOKENS,
    *dict.fromkeys((*(w for w in WORDS if w not in SPECIAL_TOKENS), *READABLE, *_READING_WORDS)),
)
READ_REQUEST = "read the picture ."
QWEN_PATCH_SIZE = 10  # 2 x 2 patches make a visual token of 20 px: 320 px give 16 x 16 = 256 tokens
QWEN_TOKEN_PX = 2 * QWEN_PATCH_SIZE
QWEN_WINDOW_PX = 80  # 4 x 4 visual tokens, as the published 112 px windows hold
QWEN_SCENE_PX = 320
