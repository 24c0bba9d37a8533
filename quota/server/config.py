"""Settings of a server: command-line flags over environment (`QUOTA_SERVE_<NAME>`) over a TOML file over defaults."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from quota.core.errors import UsageError
from quota.core.schema import Document

PREFIX = "QUOTA_SERVE_"
_LISTS = ("api_keys", "image_hosts", "cors_origins", "recipes", "allowed_hosts")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEY = re.compile(r"[!-~]{1,512}\Z")  # what a header can carry without doubt


class Settings(Document):
    """Every field is a flag, a variable and a key of the file. Lists are comma-separated in variables."""

    checkpoint: str = Field(description="quantized checkpoint folder")
    model_name: str | None = Field(default=None, description="name clients use; default: the folder's name")
    recipes: tuple[str, ...] = Field(default=(), description="recipe files as name=path; the first is the default")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    device: str = Field(default="cpu", description="where the model runs: cpu, cuda or cuda:N")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="of everything that is not quantized"
    )
    threads: int = Field(default=0, ge=0, description="compute threads, 0: all cores")
    kv_bytes: int = Field(default=256 << 20, ge=1)
    feature_bytes: int = Field(
        default=256 << 20, ge=0, description="memory for encoded images that may be asked about again"
    )
    page_tokens: int = Field(default=16, ge=1, le=4096)
    max_running: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    step_tokens: int = Field(default=512, ge=1)
    step_s: float = Field(
        default=0.25, gt=0, description="time a step should take; a slow machine gives out fewer tokens per step"
    )
    max_model_tokens: int | None = Field(default=None, ge=2, description="longest prompt plus answer")
    prefix_cache: bool = True
    api_keys: tuple[str, ...] = Field(default=(), description="accepted bearer tokens; none: no authentication")
    api_key_file: str | None = Field(default=None, description="file with one key per line")
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="names clients may call this server by; on loopback its own are known, and only those pass",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="origins browsers may call from; none: no CORS headers"
    )
    max_body_bytes: int = Field(default=32 << 20, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0)
    in_flight_bytes: int = Field(
        default=256 << 20, ge=1, description="memory for the bodies of all requests that are arriving or being prepared"
    )
    prepared_bytes: int = Field(
        default=2 << 30, ge=1, description="memory for prepared images of requests not answered yet; a client has half"
    )
    max_images: int = Field(default=8, ge=0, description="images per request")
    max_image_bytes: int = Field(default=20 << 20, ge=1)
    max_image_pixels: int = Field(default=40_000_000, ge=1)
    image_workers: int = Field(
        default=2, ge=2, le=64, description="processes that decode images; large or slow ones never take the last"
    )
    image_decode_s: float = Field(
        default=10.0, gt=0, le=600, description="processor time one image's decoding may take"
    )
    image_decode_bytes: int = Field(
        default=1 << 30, ge=1 << 20, description="memory of each of those processes, over what it starts with"
    )
    image_hosts: tuple[str, ...] = Field(
        default=(), description="hosts images may be fetched from; none: only data URLs"
    )
    image_timeout_s: float = Field(default=10.0, gt=0)
    replicas: int = Field(
        default=0,
        ge=0,
        le=100,
        description="engine processes behind Ray Serve; 0: one engine in this process, without Ray",
    )
    session_affinity: bool = Field(
        default=False, description="with replicas: requests with the same x-session-id header meet the same replica"
    )
    drain_s: float = Field(default=30.0, ge=0, description="how long a stopping server finishes what runs")
    log_file: str | None = Field(default=None, description="JSON lines; default: standard error")

    @property
    def name(self) -> str:
        return self.model_name or Path(self.checkpoint).resolve().name

    @field_validator(*_LISTS)
    @classmethod
    def _trimmed(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        trimmed = tuple(value.strip() for value in values)
        if not all(trimmed):
            raise ValueError("holds an empty entry; take it out")
        return trimmed

    @model_validator(mode="after")
    def _a_body_fits(self) -> Settings:
        if self.in_flight_bytes < self.max_body_bytes:
            raise ValueError(
                f"in_flight_bytes: {self.in_flight_bytes} hold no body of max_body_bytes {self.max_body_bytes}; give"
                " more, or allow less"
            )
        return self

    @property
    def on_loopback(self) -> bool:
        return self.host in _LOOPBACK

    @property
    def known_hosts(self) -> tuple[str, ...] | None:
        """Names that a request's Host header may hold, without port; None: any. On loopback a browser could be led here
        by a foreign name."""
        return (
            (*_LOOPBACK, *self.allowed_hosts)
            if self.on_loopback
            else (self.host, *self.allowed_hosts)
            if self.allowed_hosts
            else None
        )

    def accepted_keys(self) -> tuple[str, ...]:
        """All accepted keys. UsageError for a file that cannot be read or holds none, and for a key no client could
        send."""
        keys = [(f"api_keys, key {number}", key) for number, key in enumerate(self.api_keys, 1)]
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"api_key_file: {self.api_key_file} cannot be read as UTF-8 text ({error})") from None
            found = [
                (f"api_key_file: {self.api_key_file}, line {number}", line.strip())
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
            if not found:
                raise UsageError(
                    f"api_key_file: {self.api_key_file} holds no key; an empty file would switch authentication off"
                )
            keys += found
        for where, key in keys:  # which one, never what it is
            if not _KEY.match(key):
                raise UsageError(
                    f"{where}: expected 1 to 512 printable ASCII characters without spaces, which a header can carry"
                )
        return tuple(key for _, key in keys)


def settings(
    flags: Mapping[str, Any], file: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> Settings:
    """Combine the sources; None among the flags means not given. UsageError names the wrong or unknown field and where
    it came from."""
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read(Path(file)))
    for name, value in (os.environ if environment is None else environment).items():
        if name.startswith(PREFIX):
            field = name.removeprefix(PREFIX).lower()
            if field not in Settings.model_fields:
                raise UsageError(
                    f"{name}: no such setting; expected {PREFIX} and one of"
                    f" {', '.join(sorted(Settings.model_fields)).upper()}"
                )
            values[field] = (
                tuple(filter(None, (part.strip() for part in value.split(",")))) if field in _LISTS else value
            )
            if field == "api_keys" and not values[field]:
                raise UsageError(
                    f"{name}: set, but holds no key; unset it for a server without authentication, or give it keys with"
                    " commas between"
                )
    values.update({name: value for name, value in flags.items() if value is not None and value != () and value != []})
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        shown = where and not where.startswith("api_keys") and first["type"] != "missing"  # else the input holds keys
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            (f"{where}: " if where else "") + message + (f", got {first['input']!r}" if shown else "")
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read as TOML ({error})") from None
