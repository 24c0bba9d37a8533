"""lmms-eval asks the running server through its own OpenAI client: the answers are those of the engine asked directly,
one at a time."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from quota.runtime.engine import Engine, Request, SamplingParams
from quota.server.schemas import Message
from quota.server.service import Service, load_recipes
from tests.serve.pictures import noise

QUESTIONS = ("what color is the star ?", "describe the picture .", "which shape is in the top left ?")
TOKENS = 8
TASK = f"""
task: quota_noise
dataset_path: json
dataset_kwargs: {{data_files: {{test: docs.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tests.serve.test_lmms.picture
doc_to_text: question
doc_to_target: question
process_results: !function tests.serve.test_lmms.length
generation_kwargs: {{max_new_tokens: {TOKENS}}}
metric_list: [{{metric: words, aggregation: mean, higher_is_better: true}}]
"""


def picture(doc: dict[str, Any]) -> list[Any]:
    return [noise(seed=doc["seed"])]


def length(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"words": float(len(results[0].split()))}


def directly(service: Service, model: Any, docs: list[dict[str, Any]]) -> list[str]:
    """One request after the other in an engine of its own, prompts made as the service makes them."""
    recipes = load_recipes(service.settings)
    engine = Engine(model, tokenizer=model.processor.tokenizer, recipes=recipes, default="pruned")
    answers = []
    for doc in docs:
        parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": doc["question"]}]
        prompt = service.prompts.chat([Message.model_validate({"role": "user", "content": parts}).turn], picture(doc))
        engine.submit(Request(str(doc["seed"]), prompt, SamplingParams(max_tokens=TOKENS, temperature=0.0)))
        text = ""
        while engine.busy:
            text += "".join(output.text for output in engine.step())
        answers.append(text)
    return answers


def test_lmms_eval_gets_the_engines_answers(server, model, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval and python-dotenv")
    pytest.importorskip("dotenv", reason="needs lmms-eval and python-dotenv")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from lmms_eval import evaluator
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    docs = [{"seed": seed, "question": QUESTIONS[seed % len(QUESTIONS)]} for seed in range(9)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "quota_noise.yaml").write_text(TASK)
    arguments = f"model_version=tiny,base_url={server.url}/v1,api_key=none,num_concurrent=4,max_retries=1"
    client = get_model("openai_compatible").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    tasks = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False, model_name="openai_compatible")
    found = evaluator.simple_evaluate(
        model=client,
        tasks=["quota_noise"],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    samples = sorted(found["samples"]["quota_noise"], key=lambda sample: sample["doc_id"])
    want = directly(server.service, model, docs)
    assert [sample["filtered_resps"][0].strip() for sample in samples] == [text.strip() for text in want] and len(
        set(want)
    ) > 3
    assert found["results"]["quota_noise"]["words,none"] > 0
