"""Random weights of tiny models."""

from __future__ import annotations

from typing import Any

import torch

IMAGE_TOKEN, PAD_TOKEN = 120, 0


@torch.no_grad()
def scatter(model: Any, generator: torch.Generator) -> None:
    """Larger than a usual initialisation, so that greedy decoding is not degenerate."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = 1.0 if "embed_tokens" in name or "lm_head" in name else 1.6 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
