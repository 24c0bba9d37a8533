"""Which folder a checkpoint argument means: one that exists, or the snapshot of a hub name, looked up once."""

from __future__ import annotations

import re
from pathlib import Path

from quota.core.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_name(model: str) -> bool:
    """Whether a text that names no file here can be a hub name: `owner/name`, and no folder `owner` is here (else it is
    a mistyped path)."""
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).parent.exists()


def resolve_folder(model: str | Path) -> Path:
    """A local checkpoint folder; a hub name is downloaded (or found in the hub's cache) with one look-up.
    CheckpointError when it is neither.

    What cannot be a hub name is refused without asking the hub.
    """
    path = Path(model)
    try:
        found = path.is_dir()
        absent = not found and not path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {str(model)[:80]!r}... is no path ({error.__class__.__name__}); expected a folder or a hub"
            " name"
        ) from None
    if found:
        return path
    if not absent or not is_hub_name(str(model)):
        raise CheckpointError(
            f"{model}: no such folder; expected a checkpoint folder or a hub name such as llava-hf/llava-1.5-7b-hf"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(model), allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model}: no such folder here, and the hub cannot be asked or has no such model ({reason}); check the"
            " spelling"
        ) from None
