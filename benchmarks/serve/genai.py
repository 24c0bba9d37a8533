"""A peer with continuous batching: OpenVINO GenAI on the language model of a float LLaVA. Needs the extra bench-serve.

The engine reads LLaMA from a GGUF file, which is written here; it takes token ids and no embeddings, so pictures are as
many tokens of text, and the vision tower is no part of its work. Products are of float16 weights in float32.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

NOTE = "language model alone, float16 weights, float32 arithmetic; no vision tower"
TEXT_TOKENS = 16  # of a question, template included
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Engine:
    """The pipeline, and what a prompt is."""

    def __init__(self, checkpoint: Path, gguf_file: Path, threads: int) -> None:
        import openvino_genai

        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self.vocabulary, self.prompt_tokens = (
            config["text_config"]["vocab_size"],
            config["image_seq_length"] + TEXT_TOKENS,
        )
        schedule = openvino_genai.SchedulerConfig()
        schedule.cache_size, schedule.max_num_seqs, schedule.max_num_batched_tokens, schedule.enable_prefix_caching = (
            1,
            128,
            512,
            False,
        )
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(gguf_file), schedule, "CPU", properties)

    def prompt(self, number: int) -> np.ndarray:
        """Token ids int64 [1, S] of request `number`; none is special."""
        rng = random.Random(number)
        return np.array(
            [[1, *(rng.randrange(5, self.vocabulary) for _ in range(self.prompt_tokens - 1))]], dtype=np.int64
        )

    def ask(self, number: int, ids: np.ndarray, tokens: int) -> Any:
        """A handle of the request, greedy and of exactly `tokens` tokens."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = (
            tokens,
            True,
            False,
            False,
        )
        return self.pipeline.add_request(number, openvino.Tensor(ids), config)


@contextlib.contextmanager
def engine(checkpoint: str, threads: int) -> Iterator[Engine]:
    """RuntimeError when its first tokens are not those of transformers on the same float weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        write_gguf(Path(checkpoint), file)
        made = Engine(Path(checkpoint), file, threads)
        _check(made, Path(checkpoint))
        yield made


def measure(engine: Engine, clients: int, requests: int, tokens: int) -> tuple[float, float, list[list[float]]]:
    """(seconds, processor time, for every request the seconds until each of its tokens); `clients` requests are under
    way until none is left."""
    _run(engine, range(clients), clients, tokens)  # warms up
    return _run(engine, range(clients, clients + requests), clients, tokens)


def _run(engine: Engine, numbers: range, clients: int, tokens: int) -> tuple[float, float, list[list[float]]]:
    waiting = iter([(number, engine.prompt(number)) for number in numbers])
    running: list[tuple[float, Any, list[float]]] = []  # when it arrived, its handle, when its tokens came
    found: list[list[float]] = []
    began, spent = time.perf_counter(), time.process_time()
    while True:
        while len(running) < clients and (following := next(waiting, None)) is not None:
            running.append((time.perf_counter(), engine.ask(*following, tokens), []))
        if not running:
            return time.perf_counter() - began, time.process_time() - spent, found
        engine.pipeline.step()
        now, still = time.perf_counter(), []
        for arrived, handle, times in running:
            while handle.can_read():
                times += [now - arrived] * sum(len(output.generated_ids) for output in handle.read().values())
            if len(times) < tokens:
                still.append((arrived, handle, times))
            else:
                found.append(times)
        running = still


def _check(engine: Engine, checkpoint: Path, tokens: int = 8) -> None:
    config = LlamaConfig(**json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"])
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in _weights(checkpoint).items()})
    for number in range(4):
        ids = torch.from_numpy(engine.prompt(-number - 1))
        with torch.no_grad():
            want = model.generate(ids, max_new_tokens=tokens, eos_token_id=-1, do_sample=False)[
                0, ids.shape[1] :
            ].tolist()
        handle, got = engine.ask(number, ids.numpy(), tokens), []
        while engine.pipeline.has_non_finished_requests():
            engine.pipeline.step()
        while handle.can_read():
            got += [token for output in handle.read().values() for token in output.generated_ids]
        if got != want:
            raise RuntimeError(f"openvino genai: expected the tokens {want} of transformers, got {got}")


def _weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """The language model's, by LLaMA's names."""
    prefix = "language_model."
    found = {
        name: value for file in sorted(checkpoint.glob("*.safetensors")) for name, value in load_file(file).items()
    }
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """The language model of a float LLaVA folder as GGUF: matrices float16, norms float32, rows of queries and keys in
    GGUF's order of rotary pairs."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")  # prompts are ids: any form of tokenizer does
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if word.startswith("<") else gguf.TokenType.NORMAL for word in words]
    )
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in _weights(checkpoint).items():
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            called = f"blk.{layer}.{_PARTS[part]}"
            if part.endswith(("q_proj", "k_proj")):
                value = value.reshape(-1, 2, head_dim // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        else:
            called = _WHOLE[name.removesuffix(".weight")]
        writer.add_tensor(
            f"{called}.weight", np.ascontiguousarray(value.astype(np.float16 if value.ndim == 2 else np.float32))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
