"""Request bodies. null means not given. What has no effect is accepted; a parameter that would change the answer and is
not known is an error."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from quota.runtime.engine import SamplingParams
from quota.runtime.engine.request import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_CHARACTERS

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_MESSAGES = 2048  # each takes several tokens of the prompt
BRANCHES = frozenset(
    {"<text>", "<parts>", "<text part>", "<image part>", "<texts>", "<ids>", "<lists of ids>"}
)  # of unions, which callers do not know
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_CHAT_TOKENS = 256
_NAME_CHARACTERS = 1000


class _FailFast(FailFast):
    """A list ends at its first wrong item. Hashable, as members of unions have to be."""

    def __hash__(self) -> int:
        return 0


_AT_FIRST = _FailFast()


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


def _among(*accepted: Any) -> AfterValidator:
    """For parameters that are not implemented: the values under which the answer is what it is without them."""
    expected = " or ".join("null" if value is None else repr(value) for value in accepted)

    def check(value: Any) -> Any:
        if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in accepted):
            raise ValueError(f"only {expected} is supported")
        return value

    return AfterValidator(check)


_Zero: TypeAlias = Annotated[Any, _among(0)]
_One: TypeAlias = Annotated[Any, _among(1)]
_No: TypeAlias = Annotated[Any, _among(False)]
_Yes: TypeAlias = Annotated[Any, _among(True)]
_EmptyList: TypeAlias = Annotated[Any, _among([])]
_NoTool: TypeAlias = Annotated[Any, _among("none", "auto")]
_TokenId: TypeAlias = Annotated[str, Field(pattern=r"^\d{1,9}$")]
_Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
_Name: TypeAlias = Annotated[str, Field(max_length=_NAME_CHARACTERS)]


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # accepted for compatibility: a model has one resolution


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return {"text": "<text part>", "image_url": "<image part>"}.get(kind) if isinstance(kind, str) else None


def _kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


def _kind_of_texts(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        return "<lists of ids>" if isinstance(value[0], list) else "<ids>"
    return _kind_of_texts(value)


def _choice(kind: Any, expected: str) -> Any:
    return Discriminator(kind, custom_error_type="union_kind", custom_error_message=f"expected {expected}")


Part = Annotated[
    Annotated[TextPart, Tag("<text part>")] | Annotated[ImagePart, Tag("<image part>")],
    _choice(_kind_of_part, 'an object of type "text" or "image_url"'),
]
_Text = Annotated[str, Tag("<text>")]
_Texts = Annotated[list[str], _AT_FIRST, Tag("<texts>")]
_Ids = Annotated[list[int], _AT_FIRST]
Stop = Annotated[_Text | _Texts, _choice(_kind_of_texts, "a text, or a list of texts")]
Content = Annotated[
    _Text | Annotated[list[Part], _AT_FIRST, Tag("<parts>")], _choice(_kind_of_content, "a text, or a list of parts")
]
PromptField = Annotated[
    _Text | _Texts | Annotated[_Ids, Tag("<ids>")] | Annotated[list[_Ids], _AT_FIRST, Tag("<lists of ids>")],
    _choice(_kind_of_prompt, "a text, a list of texts, a list of token ids, or a list of those"),
]


class Message(_Body):
    """One turn. What this server sends as an assistant's message is taken back as it is, fields without content
    included."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    annotations: _EmptyList = None
    tool_calls: _EmptyList = None

    @model_validator(mode="before")
    @classmethod
    def _assistants_may_say_nothing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None:
            return {**values, "content": ""}
        return values

    @model_validator(mode="after")
    def _images_from_users(self) -> Message:
        if self.role != "user" and self.images:
            raise ValueError("only user messages can hold images")
        return self

    @property
    def images(self) -> list[str]:
        """URLs in order."""
        return (
            []
            if isinstance(self.content, str)
            else [part.image_url.url for part in self.content if isinstance(part, ImagePart)]
        )

    @property
    def texts(self) -> list[str]:
        return (
            [self.content]
            if isinstance(self.content, str)
            else [part.text for part in self.content if isinstance(part, TextPart)]
        )

    @property
    def turn(self) -> dict[str, Any]:
        """As `quota.runtime.prompts` takes it, images apart."""
        parts = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        return {
            "role": self.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in parts
            ],
        }


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against guesses by size; there is none here


class JsonSchema(_Body):
    name: _Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None  # the answer follows the schema either way


class ResponseFormat(_Body):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema: belongs to type "json_schema", and only there')
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON text; None for plain text."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class _Common(_Body):
    """What both kinds of completion take; from length_penalty to prompt_cache_key without effect. Ours: recipe, a
    name from the server's list, or "none"; keep, another final keep ratio for it; keep_tokens, most visual tokens of
    the largest image that stay; return_kept, which visual tokens stay, in the
    usage; ignore_eos, go on after the end token (for measurements)."""

    model: _Name
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    min_p: float = Field(default=0.0, ge=0, le=1)
    logit_bias: dict[_TokenId, _Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    length_penalty: _One = None
    min_tokens: _Zero = None
    stop_token_ids: _EmptyList = None
    skip_special_tokens: _Yes = None
    store: _No = None
    service_tier: Annotated[Any, _among("auto", "default")] = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    recipe: _Name | None = None
    keep: float | None = Field(default=None, gt=0, le=1)
    keep_tokens: int | None = Field(default=None, ge=1)
    return_kept: bool = False
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def schema_text(self) -> str | None:
        """The JSON schema the answer follows."""
        return None

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """Choice i of a seeded request draws with seed + i, so choices differ and each can be had again."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
            stop=self.stops,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            json_schema=self.schema_text,
        )


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), _AT_FIRST]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    modalities: Annotated[Any, _among(["text"])] = None
    tools: _EmptyList = None
    tool_choice: _NoTool = None
    parallel_tool_calls: bool | None = None
    functions: _EmptyList = None
    function_call: _NoTool = None

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @property
    def schema_text(self) -> str | None:
        return None if self.response_format is None else self.response_format.schema_text

    def samplings(self) -> list[SamplingParams]:
        limit = self.max_completion_tokens or self.max_tokens or _CHAT_TOKENS
        return [self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None, i) for i in range(self.n)]


class CompletionRequest(_Common):
    """POST /v1/completions: text or token ids as they are, without a chat template and without images."""

    prompt: PromptField
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: _No = None
    best_of: _One = None
    suffix: Annotated[Any, _among("")] = None

    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        many: Any = [self.prompt] if one else self.prompt
        return list(many)

    def samplings(self) -> list[SamplingParams]:
        return [self.sampling(self.max_tokens or _COMPLETION_TOKENS, self.logprobs, i) for i in range(self.n)]
