"""Serving many requests at once: a paged 4-bit cache by segment, continuous batching, deterministic sampling."""

from quota.runtime.engine.engine import Engine, EngineConfig, QueueFull
from quota.runtime.engine.front import AsyncEngine, Closed
from quota.runtime.engine.request import Output, Prompt, Request, Sampling, TokenLogprob, Usage

__all__ = [
    "AsyncEngine",
    "Closed",
    "Engine",
    "EngineConfig",
    "Output",
    "Prompt",
    "QueueFull",
    "Request",
    "Sampling",
    "TokenLogprob",
    "Usage",
]
