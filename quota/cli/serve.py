"""`quota serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quota.cli.shell import FloatType, check_checkpoint
from quota.core.errors import UsageError

_SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str | None) -> int | None:
    """ "512M" -> 536870912."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1].lower()) if text and text[-1].lower() in _SIZES else (text, "")
    if not number.isdecimal() or not int(number):
        raise UsageError(f"--kv-bytes: expected a number of bytes such as 512M or 2G, got {text!r}")
    return int(number) * _SIZES.get(unit, 1)


def serve(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="Quantized checkpoint folder.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="Recipe as name=path; repeat. The first is the default.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="Default 8000.")] = None,
    name: Annotated[
        str | None, typer.Option("--model-name", help="Name that clients use; default: the folder's.")
    ] = None,
    kv_bytes: Annotated[
        str | None, typer.Option("--kv-bytes", help="Memory of the key/value pool, for example 512M.")
    ] = None,
    max_running: Annotated[int | None, typer.Option("--max-running", help="Most requests in one batch.")] = None,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", help="Most requests in the queue; more get status 429.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Where the model runs: cpu (default), cuda or cuda:N.")
    ] = None,
    dtype: Annotated[
        FloatType | None, typer.Option("--dtype", help="Of everything that is not quantized; default float32.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Compute threads; default: all cores.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with one accepted key per line.")
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option("--image-host", help="Host that images may be fetched from; repeat. None by default."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="Origin that browsers may call from; repeat. None by default."),
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="Structured log; default: standard error.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", help="Engine processes behind Ray Serve; default: one engine, without Ray."),
    ] = None,
    session_affinity: Annotated[
        bool | None,
        typer.Option(
            "--session-affinity",
            help="With --replicas: the same x-session-id header meets the same replica and its warm cache.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with any of the settings.")] = None,
) -> None:
    """Serve a quantized model to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready,
    /metrics, and a page at /demo.

    Every setting can also come from the environment as QUOTA_SERVE_NAME, or from a TOML file; flags win.

    **Examples**

        quota serve demo-out/quantized --recipe quota=demo-out/recipe.json

        quota serve llava-w4a4kv4 --device cuda --dtype float16 --kv-bytes 8G

        quota serve CHECKPOINT --replicas 4 --threads 8 --session-affinity      # needs the extra ray; kill -HUP
        restarts them one by one

        QUOTA_SERVE_MAX_IMAGES=2 quota serve CHECKPOINT --port 9000 --kv-bytes 2G --api-key-file keys.txt
    """
    try:
        from quota.server.config import settings
        from quota.server.run import serve as run
    except ImportError as error:
        raise UsageError(
            f"serve: needs the package {error.name}; install it from the clone: pip install -e '.[serve]'"
        ) from None
    flags: dict[str, Any] = {
        "checkpoint": checkpoint,
        "recipes": tuple(recipe or ()),
        "host": host,
        "port": port,
        "model_name": name,
        "kv_bytes": parse_bytes(kv_bytes),
        "max_running": max_running,
        "max_waiting": max_waiting,
        "threads": threads,
        "api_key_file": str(api_key_file) if api_key_file else None,
        "image_hosts": tuple(image_host or ()),
        "cors_origins": tuple(cors_origin or ()),
        "log_file": str(log_file) if log_file else None,
        "replicas": replicas,
        "session_affinity": session_affinity,
        "device": device,
        "dtype": dtype.value if dtype else None,
    }
    made = settings(flags, config)
    check_checkpoint(made.checkpoint)
    run(made)
