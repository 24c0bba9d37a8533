"""The base of every document that quota writes or reads as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """Immutable, and a field it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
