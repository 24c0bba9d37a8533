"""The shapes that are timed: projections and attentions of real models, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quota.core.errors import UsageError

ROWS = (1, 2, 4, 8, 16, 64, 173, 640, 2048)  # 173: 30 % of 576 visual tokens; 640: 576 visual and 64 text tokens
QUICK_ROWS = (1, 16, 173)
QUICK = "llava-1.5-7b.down"


@dataclass(frozen=True)
class Linear:
    """One projection group: K input features, N output rows (fused groups count all their rows)."""

    name: str
    k: int
    n: int


@dataclass(frozen=True)
class Attention:
    """Query heads, key/value heads and head size of one model's attention."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder layer, or of a vision layer when `gated` is False."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True

    def linears(self) -> tuple[Linear, ...]:
        wide = (self.heads + 2 * self.kv_heads) * self.head_dim
        up = ("gate_up", 2 * self.inner) if self.gated else ("fc1", self.inner)
        return (
            Linear(f"{self.name}.qkv", self.hidden, wide),
            Linear(f"{self.name}.o", self.heads * self.head_dim, self.hidden),
            Linear(f"{self.name}.{up[0]}", self.hidden, up[1]),
            Linear(f"{self.name}.{'down' if self.gated else 'fc2'}", self.inner, self.hidden),
        )


MODELS = (
    Decoder("llava-1.5-7b", 4096, 11008, 32, 32, 128),
    Decoder("qwen2.5-vl-7b", 3584, 18944, 28, 4, 128),
    Decoder("qwen2.5-vl-3b", 2048, 11008, 16, 2, 128),
    Decoder("clip-l", 1024, 4096, 16, 16, 64, gated=False),
    Decoder("qwen2.5-vl-vit", 1280, 3420, 16, 16, 80),
    Decoder("llama-135m", 576, 1536, 9, 3, 64),
    Decoder("embedded", 192, 512, 3, 3, 64),
)
LINEARS = tuple(linear for model in MODELS for linear in model.linears())
ATTENTIONS = tuple(
    Attention(m.name, m.heads, m.kv_heads, m.head_dim) for m in MODELS if m.name not in ("clip-l", "qwen2.5-vl-vit")
)


def chosen_linears(names: Iterable[str]) -> list[Linear]:
    """Shapes whose name is, or starts with, one of `names` ("llava-1.5-7b", "llava-1.5-7b.down"); none given: all."""
    return _chosen(LINEARS, list(names))


def chosen_attentions(names: Iterable[str]) -> list[Attention]:
    """Models of `chosen_linears` names that have a decoder."""
    models = {name.partition(".")[0] for name in names}
    return [a for a in ATTENTIONS if not models or any(a.name.startswith(m) for m in models)]


def _chosen(shapes: tuple[Linear, ...], names: list[str]) -> list[Linear]:
    for name in names:
        if not any(s.name.startswith(name) for s in shapes):
            raise UsageError(
                f"--shape: expected the name of a shape or its beginning, one of {', '.join(s.name for s in shapes)};"
                f" got {name!r}"
            )
    return [s for s in shapes if not names or any(s.name.startswith(n) for n in names)]
