"""Peers of the throughput benchmark on the same questions: transformers' `generate` in batches, and transformers' own
server."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.serve.traffic import QUESTIONS, image_bytes
from quota.core.images import decode
from quota.runtime.load import load

# the form LLaVA-1.5 was trained with, for checkpoints without a template of their own
_PLAIN = (
    "{%- for message in messages -%}{{ message['role'] | upper + ': ' }}{%- for part in message['content'] -%}{%- if"
    " part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{{ ' '"
    " }}{%- endfor -%}{{ 'ASSISTANT:' }}"
)


def question(number: int, size: tuple[int, int]) -> tuple[str, bytes]:
    """Text and encoded picture of question `number`, always exactly the same."""
    return QUESTIONS[number % len(QUESTIONS)], image_bytes(random.Random(number), size)


class _Clock(BaseStreamer):
    """When each token of a batch came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(
    checkpoint: str, clients: int, tokens: int, batches: int, size: tuple[int, int]
) -> tuple[float, float, list[list[float]]]:
    """transformers' generate in this process, as many threads as torch has: batches of `clients` requests, exactly
    `tokens` tokens each, nothing pruned. Returns (seconds of all batches, their processor time, for every request the
    seconds until each of its tokens); the rows of a batch come together."""
    model = load(checkpoint)
    processor, seconds, cpu_s, found = model.processor, 0.0, 0.0, []
    for turn in range(batches + 1):
        asked = [question(number, size) for number in range(turn * clients, (turn + 1) * clients)]
        images = [decode(data) for _, data in asked]
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text, _ in asked
        ]
        template = processor.chat_template or _PLAIN
        texts = [
            processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
            for messages in turns
        ]
        clock, began, spent = _Clock(), time.perf_counter(), time.process_time()
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
        if turn:  # the first batch warms up
            seconds += time.perf_counter() - began
            cpu_s += time.process_time() - spent
            found += [[at - began for at in clock.times[1:]]] * clients  # the first call is the prompt
    return seconds, cpu_s, found


@contextlib.contextmanager
def endless(checkpoint: str) -> Iterator[str]:
    """A copy of a float folder that transformers' server can serve: with a chat template, and without an end token, so
    that answers have the length that is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(checkpoint, copy)
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "pad_token_id": 0}))
        if not (copy / "chat_template.jinja").exists():
            (copy / "chat_template.jinja").write_text(_PLAIN)
        yield str(copy)


def serve_command(checkpoint: str, port: int) -> list[str]:
    """Command line of `transformers serve` for one model."""
    start = "from transformers.cli.transformers import main; main()"  # as its console script does
    return [
        sys.executable,
        "-c",
        start,
        "serve",
        checkpoint,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]


def threads(count: int) -> dict[str, str]:
    """The environment that gives it so many: it uses torch's default."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "HF_HUB_OFFLINE": "1"}
