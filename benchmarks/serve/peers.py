"""Peers of the throughput benchmark on the same questions: transformers' `generate` in batches, and transformers' own server."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serve.traffic import QUESTIONS, picture_bytes

# the form LLaVA-1.5 was trained with, for checkpoints without a template of their own
_PLAIN = (
    "{%- for message in messages -%}{{ message['role'] | upper + ': ' }}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{{ ' ' }}{%- endfor -%}{{ 'ASSISTANT:' }}"
)


def question(number: int, size: tuple[int, int]) -> tuple[str, bytes]:
    """Text and encoded picture of question `number`, always exactly the same."""
    return QUESTIONS[number % len(QUESTIONS)], picture_bytes(random.Random(number), size)


def generate(checkpoint: str, clients: int, tokens: int, batches: int, size: tuple[int, int]) -> dict[str, Any]:
    """transformers' generate in this process, as many threads as torch has: batches of `clients` requests, exactly `tokens` tokens each, nothing pruned.
    Time to first token is not reported: generate returns a batch when its last row is done."""
    import torch
    from PIL import Image

    from quota.runtime.load import load

    model = load(checkpoint)
    processor, seconds = model.processor, 0.0
    for turn in range(batches + 1):
        asked = [question(number, size) for number in range(turn * clients, (turn + 1) * clients)]
        images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in asked]
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text, _ in asked]
        template = processor.chat_template or _PLAIN
        texts = [processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False) for messages in turns]
        began = time.perf_counter()
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        seconds += (time.perf_counter() - began) * bool(turn)  # the first batch warms up
    requests = clients * batches
    return {"clients": clients, "requests": requests, "tokens": tokens * requests, "tokens_per_s": round(tokens * requests / seconds, 1)}


@contextlib.contextmanager
def endless(checkpoint: str) -> Iterator[str]:
    """A copy of a float folder that transformers' server can serve: with a chat template, and without an end token, so that answers have the length that
    is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(checkpoint, copy)
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "pad_token_id": 0}))
        if not (copy / "chat_template.jinja").exists():
            (copy / "chat_template.jinja").write_text(_PLAIN)
        yield str(copy)


def serve_command(checkpoint: str, port: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `transformers serve` for one model."""
    # its threads are torch's default, which these variables set
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", checkpoint, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [*command, "--dtype", "float32"], environment
