"""Request bodies. An unknown or unsupported parameter is an error, never silently ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quota.runtime.engine import Sampling
from quota.runtime.engine.request import MAX_LOGPROBS

MAX_CHOICES = 8
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_CHAT_TOKENS = 256


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # accepted for compatibility: a model has one resolution


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="after")
    def _pictures_from_users(self) -> Message:
        if self.role != "user" and self.images:
            raise ValueError("only user messages can hold pictures")
        return self

    @property
    def images(self) -> list[str]:
        """URLs in order."""
        return [] if isinstance(self.content, str) else [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    @property
    def texts(self) -> list[str]:
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content if isinstance(part, TextPart)]


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: Literal["text"]


class _Common(_Body):
    """What both kinds of completion take. Ours: recipe, a name from the server's list, or "none"; keep, another final keep ratio for it;
    ignore_eos, go on after the end token (for measurements)."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0.0, ge=0, le=0, description="not supported: only 0")
    frequency_penalty: float = Field(default=0.0, ge=0, le=0, description="not supported: only 0")
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0, description="not supported: only empty")
    user: str | None = None
    recipe: str | None = None
    keep: float | None = Field(default=None, gt=0, le=1)
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not stop for stop in stops):
            raise ValueError("expected at most 4 texts, none empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> Sampling:
        """Choice i of a seeded request draws with seed + i, so choices differ and each can be had again."""
        seed = None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        return Sampling(max_tokens, self.temperature, self.top_p, self.top_k, seed, self.stops, logprobs, self.ignore_eos)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    def samplings(self) -> list[Sampling]:
        limit = self.max_completion_tokens or self.max_tokens or _CHAT_TOKENS
        return [self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None, i) for i in range(self.n)]


class CompletionRequest(_Common):
    """POST /v1/completions: text or token ids as they are, without a chat template and without pictures."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        many: Any = self.prompt
        return list(many)

    def samplings(self) -> list[Sampling]:
        return [self.sampling(self.max_tokens or _COMPLETION_TOKENS, self.logprobs, i) for i in range(self.n)]
