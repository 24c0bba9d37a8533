"""Serving many requests at once: a paged cache by segment, continuous batching, deterministic sampling."""

from quota.runtime.engine.async_engine import AsyncEngine, Closed
from quota.runtime.engine.engine import Engine, EngineConfig, QueueFull
from quota.runtime.engine.request import Output, Prompt, Request, SamplingParams, TokenLogprob, Usage

__all__ = [
    "AsyncEngine",
    "Closed",
    "Engine",
    "EngineConfig",
    "Output",
    "Prompt",
    "QueueFull",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
