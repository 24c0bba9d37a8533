"""A profile with the published shape, for tests of everything that reads one."""

from __future__ import annotations

from quota.allocate.profile import Profile
from quota.core.recipe import ModelFacts


def profile(layers: int = 8, jump: int = 2, visual_tokens: int = 576, **changes: object) -> Profile:
    """`layers` decoder layers whose attention concentration jumps at layer `jump`."""
    concentration = [0.12 + 0.01 * i if i < jump else 0.55 - 0.02 * (i - jump) for i in range(layers)]
    plain: dict = {
        "model": ModelFacts(
            architecture="LlavaForConditionalGeneration",
            fingerprint="sha256:aa",
            layers=layers,
            visual_tokens=visual_tokens,
            hidden_size=192,
            kv_size=192,
            intermediate_size=512,
            head_dim=64,
            text_tokens=16,
            vision_macs=800_000_000,
        ),
        "regime": "w4a4kv4",
        "samples": 128,
        "calibration_fingerprint": "sha256:bb",
        "tool_version": "0.1.0",
        "concentration_median": tuple(concentration),
        "concentration_q25": tuple(0.8 * c for c in concentration),
        "concentration_q75": tuple(min(1.0, 1.2 * c) for c in concentration),
        "redundancy_median": tuple(0.5 + 0.4 * i / layers for i in range(layers)),
        "sensitivity": tuple(0.1 + 0.03 * ((i * 5) % layers) for i in range(layers)),
    }
    return Profile(**{**plain, **changes})
