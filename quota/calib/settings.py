"""What a calibration is asked to do: one dataclass, whose fields' defaults and words the command line shows too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from quota.core.errors import UsageError
from quota.core.formats import MODULES, SCHEMES, Scheme, scheme_made_by


@dataclass(frozen=True)
class Method:
    """How a block is quantized. learns: transforms and clips, in steps; else weights alone are rounded. samples: it
    reads any. inputs: what its authors show a block. What it costs beside passing the samples, for the plan's time:
    observed: float passes over the items; searches: of what finding FlatQuant's start costs; products: of the block's
    weights with `search_rows` rows; factored: a matrix as wide as a group's input is inverted."""

    learns: bool = False
    samples: bool = True
    inputs: str = "float"
    observed: int = 0
    searches: float = 1.0
    products: int = 0
    factored: bool = False


# What a method makes: the row of `quota.core.formats.SCHEMES` that lists it. Searches are fitted on the embedded
# LLaVA's blocks, one thread: GPTQ goes through a weight's columns one by one; AWQ tries 20 scales and then clips;
# rounding does each weight once.
METHODS = {
    "flatquant": Method(learns=True, products=8),
    "gptq": Method(inputs="quantized", observed=2, searches=0.3, factored=True),
    "awq": Method(observed=1, products=40),
    "rtn": Method(samples=False, searches=0.05),
}
INPUTS = ("float", "quantized", "mixed")
DTYPES = ("float32", "float16", "bfloat16")


def _setting(default: Any, words: str) -> Any:
    return field(default=default, metadata={"words": words})


@dataclass(frozen=True)
class Settings:
    """Calibration settings. Every field is part of the resume key, so changing one starts over. UsageError names a
    field out of its range."""

    method: str = _setting(
        "flatquant", " ".join(f"{row.name} ({row.words()}): {', '.join(row.methods)}." for row in SCHEMES.values())
    )
    scheme: str | None = _setting(
        None, "What is quantized, of what the method makes. None: the first scheme that lists the method."
    )
    modules: Sequence[str] = _setting(MODULES, "Which parts to quantize; the others stay float.")
    seed: int = _setting(0, "Same seed, same checkpoint.")
    steps: int = _setting(60, "Steps per block (flatquant). 0: the searched start alone.")
    batch: int = _setting(4, "Samples per step.")
    search_rows: int = _setting(1024, "Tokens used by the one-dimensional clip searches.")
    held_out: int = _setting(8, "Samples kept out of training, on which the best iterate is chosen.")
    evaluate_every: int = _setting(20, "Steps between two looks at the held-out samples.")
    matrix_lr: float = _setting(5e-3, "AdamW rate (cosine decay) for the transforms.")
    clip_lr: float = _setting(5e-2, "AdamW rate (cosine decay) for the clip logits.")
    diag_alpha: float = _setting(0.3, "Weight of the inputs' range in the searched start of the per-channel scales.")
    text_share: float | None = _setting(
        None,
        "Where images and text share the stream, the share of the loss that text tokens have together; None: every"
        " token has the same weight.",
    )
    relative: bool = _setting(
        False,
        "Divide each token's squared error by its float output's mean square, so that large tokens do not outweigh"
        " the others.",
    )
    inputs: str | None = _setting(
        None,
        "What a block sees while it learns to reproduce the float block's output on the float input: float (as"
        " published), quantized (the output of the already quantized blocks) or mixed (flatquant: both, half of the"
        " batch each). None: quantized for gptq, as published, and float for the others.",
    )
    stream_dtype: str = _setting("float32", "Storage of hidden states between blocks: float32 or float16.")
    device: str = _setting("cpu", "Where blocks run, one at a time: cpu, cuda or cuda:N. Samples stay on the host.")
    dtype: str = _setting(
        "float32",
        "Of the products inside blocks (linears, attention): float32, float16 or bfloat16. What is learned, rounded and"
        " stored is float32.",
    )

    def __post_init__(self) -> None:
        _expect(self.method in METHODS, "method", f"one of {', '.join(METHODS)}", self.method)
        try:
            scheme_made_by(self.method, self.scheme)
        except ValueError as error:
            raise UsageError(f"scheme: {error}; leave it out, or choose another method") from None
        wrong = isinstance(self.modules, str) or not self.modules or bool(set(self.modules) - set(MODULES))
        _expect(not wrong, "modules", f"some of {', '.join(MODULES)}", self.modules)
        object.__setattr__(self, "modules", tuple(name for name in MODULES if name in self.modules))
        _expect(self.inputs in (None, *INPUTS), "inputs", f"one of {', '.join(INPUTS)}", self.inputs)
        _expect(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _expect(self.stream_dtype in ("float32", "float16"), "stream_dtype", "float32 or float16", self.stream_dtype)
        _expect(self.steps >= 0, "steps", ">= 0", self.steps)
        for name in ("batch", "search_rows", "held_out", "evaluate_every"):
            _expect(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _expect(self.text_share is None or 0 < self.text_share < 1, "text_share", "in (0, 1) or None", self.text_share)
        _expect(0 <= self.diag_alpha <= 1, "diag_alpha", "in [0, 1]", self.diag_alpha)
        for name, unset in (("steps", self.steps == Settings.steps), ("inputs", self.inputs != "mixed")):
            if not METHODS[self.method].learns and not unset:
                learners = ", ".join(method for method, row in METHODS.items() if row.learns)
                raise UsageError(
                    f"{name}: only method {learners} learns in steps from batches; leave {name}"
                    f" {getattr(self, name)!r} out with {self.method!r}"
                )

    @property
    def makes(self) -> Scheme:
        """The scheme of the checkpoint."""
        return scheme_made_by(self.method, self.scheme)

    @property
    def learns_from(self) -> str:
        """One of INPUTS: `inputs`, or what the method's authors use."""
        return self.inputs or METHODS[self.method].inputs

    @property
    def products(self) -> Any:
        """`dtype` as torch's."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def on_cpu(self) -> bool:
        """Whether blocks run where samples lie."""
        return self.device.partition(":")[0] == "cpu"

    @property
    def place(self) -> str:
        """What of device and dtype a result depends on: the kind of device, and the dtype where it is not float32."""
        return self.device.partition(":")[0] + ("" if self.dtype == "float32" else f" {self.dtype}")

    def numbers(self) -> dict[str, Any]:
        """JSON-able: what a manifest tells under `settings`, `place` as `device`. Method, scheme, modules and seed have
        places of their own."""
        told = {**asdict(self), "inputs": self.learns_from, "device": self.place}
        elsewhere = ("method", "scheme", "modules", "seed", "dtype")
        return {name: value for name, value in told.items() if name not in elsewhere}


WORDS: dict[str, str] = {setting.name: setting.metadata["words"] for setting in fields(Settings)}
Settings.__doc__ = f"{Settings.__doc__}\n\n" + "\n".join(f"    {name}: {words}" for name, words in WORDS.items())


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise UsageError(f"{name}: expected {expected}, got {got!r}")


DEFAULTS = Settings()
