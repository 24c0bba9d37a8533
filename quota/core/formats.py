"""What every stored number means (`Format`), what a quantized model is made of (`Scheme`), and the schemes there are.

A checkpoint, a recipe and a command name a scheme by its key in `SCHEMES`; the name is looked up once, where it enters
(`scheme_named`), and everything behind that asks the row. A new scheme of existing formats is a row; a new format is a
`Format`, and a linear module where no existing one computes with it (docs/adding.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from quota.core.documents import shown

MODULES = ("vision", "projector", "llm")  # what can be quantized, in the order of a forward pass
_FLOAT32_BYTES = 4
_SCALE_BYTES = {"float32": _FLOAT32_BYTES, "e4m3": 1, "e8m0": 1, None: 0}
_BYTE_BITS = 8


@dataclass(frozen=True)
class Format:
    """Codes of a vector (a row of a weight, a token's activations, one head of a cached token) and their scales.

    bits: of a code. stored_bits: that it takes in memory, at least `bits`; several codes share a byte, the first
    lowest. group: neighbours that share a scale, the last group may be short; None: the whole vector. zero: None where
    codes are two's complement around zero, value = code * scale; else codes count from 0 and each scale has a zero
    beside it, "code" (uint8, value = (code - zero) * scale) or "value" (float32, value = code * scale + zero).
    symmetric: the grid reaches equally far on both sides of zero. number: what a code is, "int" or the name of a float
    type, whose values are its own grid. scale: the type of scales; None: there are none.
    """

    bits: int
    stored_bits: int = 4
    group: int | None = None
    zero: Literal["code", "value"] | None = None
    symmetric: bool = False
    number: Literal["int", "float16", "e4m3", "e2m1"] = "int"
    scale: Literal["float32", "e4m3", "e8m0"] | None = "float32"

    def __post_init__(self) -> None:
        if self.number != "int":
            return
        if not 2 <= self.bits <= self.stored_bits or _BYTE_BITS % self.stored_bits:
            raise ValueError(
                f"format: expected 2 or more bits in a divisor of {_BYTE_BITS} stored ones, got {self.bits} in"
                f" {self.stored_bits}"
            )
        if self.zero is None and not self.symmetric:
            raise ValueError("format: signed codes reach equally far on both sides of zero; expected symmetric=True")

    @property
    def dtype(self) -> str:
        """How reports name the type of a code: "int4", "float16"."""
        return f"int{self.bits}" if self.number == "int" else self.number

    @property
    def unsigned(self) -> Format:
        """The same grid in codes that count from 0."""
        return replace(self, zero="code")

    @property
    def middle(self) -> int:
        """The code that stands for zero in a symmetric grid of codes that count from 0."""
        return 1 << (self.bits - 1)

    @property
    def low(self) -> int:
        """The smallest code."""
        return -self.middle if self.zero is None else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """Steps of the grid: between zero and the largest magnitude where it is symmetric, else between the ends of the
        range. A scale is that length divided by it."""
        return self.middle - 1 if self.symmetric else self.high - self.low

    def code_bytes(self, k: int) -> int:
        """Bytes of the codes of a vector of k values."""
        return -(-k * self.stored_bits // _BYTE_BITS)

    def groups(self, k: int) -> int:
        """Scales of a vector of k values."""
        return 1 if self.group is None else -(-k // self.group)

    def vector_bytes(self, k: int) -> int:
        """Bytes of a vector of k values: codes, scales and zeros."""
        zero = {None: 0, "code": 1, "value": _FLOAT32_BYTES}[self.zero]
        return self.code_bytes(k) + self.groups(k) * (_SCALE_BYTES[self.scale] + zero)

    def stored_as(self, other: Format) -> bool:
        """Whether what computes with stored codes of `other` computes with these: all but the grid is equal."""
        return (self.stored_bits, self.group, self.zero) == (other.stored_bits, other.group, other.zero)

    def words(self) -> str:
        """`int4`, `int4 in groups of 128`."""
        return self.dtype if self.group is None else f"{self.dtype} in groups of {self.group}"


INT4 = Format(4, symmetric=True)  # weights, a scale per output channel; activations, a scale per token
INT4_GROUPS = Format(4, group=128, zero="code")  # weights alone
INT8 = Format(8, stored_bits=8, symmetric=True)  # as INT4
FP8 = Format(8, stored_bits=8, number="e4m3")  # as INT4
NVFP4 = Format(4, group=16, number="e2m1", scale="e4m3")  # and a float32 scale per weight, or per token
MXFP4 = Format(4, group=32, number="e2m1", scale="e8m0")
KV4 = Format(4, zero="value")  # keys and values, scale and zero per token and head
KV16 = Format(16, stored_bits=16, number="float16", scale=None)  # keys and values as they are


@dataclass(frozen=True)
class Scheme:
    """What a quantized model is made of. None of `weights`, `activations`: that stays float. kv: how keys and values
    are stored; blocks are ours in every scheme, so a row's bits do not depend on its batch, and linears that read the
    same input are one.

    name: in manifests, recipes and commands. linear: the module class, `file:Class` of `quota.nn`; it is imported when
    a model is built, since this room lies below. transforms: linears that quantize their input transform it (Kronecker
    factors), attention its queries and keys. methods: of `quota calibrate` that make it; of the
    schemes that list one, it makes the first where none is named.
    """

    name: str
    weights: Format | None = None
    activations: Format | None = None
    kv: Format | None = None
    transforms: bool = False
    linear: str = ""
    methods: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name as text spells it: `W4A4KV4`."""
        return self.name.upper()

    def words(self) -> str:
        """`weights int4, activations int4, cache int4`, leaving out what stays float."""
        parts = (("weights", self.weights), ("activations", self.activations), ("cache", self.kv))
        return ", ".join(f"{what} {form.words()}" for what, form in parts if form is not None)


FLOAT = Scheme("float")
_ROWS = (
    Scheme(
        "w4a4kv4",
        weights=INT4,
        activations=INT4,
        kv=KV4,
        transforms=True,
        linear="linear:QuantLinear",
        methods=("flatquant",),
    ),
    Scheme(
        "w4a16",
        weights=INT4_GROUPS,
        kv=KV16,
        linear="weight_linear:WeightLinear",
        methods=("gptq", "awq", "rtn"),
    ),
    Scheme(
        "w4a16kv4",
        weights=INT4_GROUPS,
        kv=KV4,
        transforms=True,
        linear="weight_linear:WeightLinear",
        methods=("gptq", "awq", "rtn"),
    ),
    Scheme("w8a8", weights=INT8, activations=INT8, kv=KV16, linear="byte_linear:ByteLinear", methods=("gptq", "rtn")),
    *(
        Scheme(name, form, form, KV16, linear="minifloat_linear:MinifloatLinear", methods=("rtn",))
        for name, form in (("fp8", FP8), ("nvfp4", NVFP4), ("mxfp4", MXFP4))
    ),
)
SCHEMES = {row.name: row for row in _ROWS}
DEFAULT, WEIGHT_ONLY = SCHEMES["w4a4kv4"], SCHEMES["w4a16"]


def scheme_named(name: Any) -> Scheme:
    """The row of that name; ValueError with the names there are for anything else."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"this quota reads {', '.join(SCHEMES)}, got {shown(name)}")
    return SCHEMES[name]


def scheme_made_by(method: str, name: str | None = None) -> Scheme:
    """The scheme of that name, or the first that a calibration method makes; ValueError for one that it does not
    make."""
    made = {row.name: row for row in SCHEMES.values() if method in row.methods}
    if name is not None and name not in made:
        raise ValueError(f"method {method!r} makes {', '.join(made)}, got {shown(name)}")
    return next(iter(made.values())) if name is None else made[name]


def scheme_of(module: Any) -> Scheme:
    """The scheme of a quantized module (linear, attention); FLOAT for any other."""
    return getattr(module, "scheme", FLOAT)
