"""The published benchmarks by their own names and code, on small local copies, and what happens when something is
missing.

The model's answers are dictated here: what is tested is data, prompts, scoring and failures. All six run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lmms_eval import tasks as lmms_tasks
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.task import ConfigurableTask

from quota.core.errors import UsageError
from quota.lmms import TASKS
from quota.lmms.model import Quota
from quota.lmms.run import Plan, find_tasks, reason, run_tasks
from quota.lmms.scores import Benchmark
from tests.lmms import mirrors

FOLDERS = ("pope", "mme", "gqa", "seedbench", "scienceqa", "mmbench")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    mirrors.make_all(root)
    return root


@pytest.fixture(scope="module")
def manager() -> Any:
    """Of the six benchmarks' folders alone: indexing all of lmms-eval's takes ten seconds."""
    folder = Path(lmms_tasks.__file__).parent
    return lmms_tasks.TaskManager(
        "ERROR",
        include_path=[str(TASKS), *(str(folder / name) for name in FOLDERS)],
        include_defaults=False,
        model_name="quota",
    )


@pytest.fixture
def run(
    llava_folder: Path, data: Path, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Benchmark, list[str]]]:
    """run(task, said) -> (outcome, prompts); said: place of a request -> the model's answer."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))

    def runs(task: str, said: Callable[[int], str]) -> tuple[Benchmark, list[str]]:
        made, prompts = Quota(pretrained=str(llava_folder)), []

        def answers(requests: list[Any]) -> list[GenerationResult]:
            wrapper = made.opened()[2]
            prompts.extend(wrapper.render(made.conversation(request)) for request in requests)
            return [GenerationResult(said(i), TokenCounts(1, 1)) for i in range(len(requests))]

        monkeypatch.setattr(made, "generate_until", answers)
        return run_tasks(made, Plan((task,), tmp_path / "out", data), manager)[task], prompts

    return runs


def test_pope(run: Any) -> None:
    outcome, prompts = run("pope", lambda i: "Yes" if i < 3 else "no")
    assert (
        outcome.metric == "pope_accuracy"
        and outcome.scores.tolist() == [1, 0, 1, 1, 0, 1]
        and outcome.answers[3] == "no"
    )
    assert (
        prompts[0]
        == "USER: <image>\nIs there a dog number 0?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )


def test_mme_is_a_sum_over_categories_of_pairs(run: Any) -> None:
    outcome, prompts = run("mme", lambda i: ("yes", "no")[i % 2] if i < 4 else "yes")
    assert {name: values.tolist() for name, values in outcome.scores.items()} == {
        "existence": [200, 200],
        "color": [50, 50],
        "code_reasoning": [50],
    }
    assert outcome.score == 300 and "Please answer" not in prompts[0]


def test_gqa_joins_questions_and_pictures(run: Any) -> None:
    outcome, prompts = run("gqa", lambda i: "Dog." if i else "cat")
    assert outcome.scores.tolist() == [0, 1, 1, 1] and "<image>\nWhat is in place 3?" in prompts[3]


def test_seedbench_shows_frames_as_pictures(run: Any) -> None:
    outcome, prompts = run("seedbench", lambda i: "A. thing" if i else "B")
    assert outcome.metric == "seed_all" and outcome.scores.tolist() == [0, 1, 1]
    assert [prompt.count("<image>") for prompt in prompts] == [1, 3, 1]


def test_scienceqa_img(run: Any) -> None:
    outcome, prompts = run("scienceqa_img", lambda i: "A")
    assert outcome.scores.tolist() == [1, 0, 1] and "Context: Look." in prompts[0] and "Context" not in prompts[1]


def test_mmbench_counts_a_question_right_in_all_its_forms(run: Any) -> None:
    outcome, _ = run("mmbench_en_dev_static", lambda i: "A")
    assert outcome.scores.tolist() == [0, 100]
    outcome, _ = run("mmbench_en_dev_static", lambda i: "B" if i == 1 else "A")
    assert outcome.scores.tolist() == [100, 100]


def test_the_judged_mmbench_wants_its_judge(monkeypatch: pytest.MonkeyPatch, manager: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(lmms_tasks, "TaskManager", lambda *args, **kwargs: manager)
    with pytest.raises(UsageError, match=r"mmbench_en_dev: expected OPENAI_API_KEY.*mmbench_en_dev_static"):
        find_tasks(["mmbench_en_dev"])


# -- failures
# ------------------------------------------------------------------------------------------------------------


def test_wrong_names(monkeypatch: pytest.MonkeyPatch, manager: Any) -> None:
    monkeypatch.setattr(lmms_tasks, "TaskManager", lambda *args, **kwargs: manager)
    with pytest.raises(UsageError, match=r"no task 'poppe'; near ones: .*pope"):
        find_tasks(["quota_scenes", "poppe"])
    with pytest.raises(UsageError, match="no task 'zzzzzzzz'; the embedded ones are"):
        find_tasks(["zzzzzzzz"])


def test_missing_data(llava_folder: Path, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenacity import wait_none

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    made = Quota(pretrained=str(llava_folder))
    with pytest.raises(UsageError, match=r"task pope: its data cannot be opened \(.+\); expected a copy under"):
        run_tasks(made, Plan(("pope",), tmp_path / "out", tmp_path), manager)
    assert made._opened is None


def test_a_failure_inside_lmms_eval_has_its_reason(run: Any, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a pair of MME, which its scoring does not allow."""
    from lmms_eval import evaluator

    simple_evaluate = evaluator.simple_evaluate
    monkeypatch.setattr(evaluator, "simple_evaluate", lambda **given: simple_evaluate(**{**given, "limit": 3}))
    with pytest.raises(
        UsageError, match="lmms-eval failed on mme: AssertionError: MME only supports pairwise evaluation"
    ):
        run("mme", lambda i: "yes")


def test_a_fault_of_the_model_passes_as_it_is(
    llava_folder: Path, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quota.lmms.model as m

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(m, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_tasks(Quota(pretrained=str(llava_folder)), Plan(("quota_scenes_choice",), tmp_path, None, 1), manager)


def test_a_metric_that_is_no_mean_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from quota.lmms import scores

    monkeypatch.setitem(scores.RULES, "pope", scores.Rule(("pope_f1_score",)))
    with pytest.raises(UsageError, match=r"task pope: none of its metrics .*is a mean over questions"):
        run("pope", lambda i: "yes" if i < 3 else "no")


def test_reasons_come_from_under_the_retries() -> None:
    from tenacity import RetryError, retry, stop_after_attempt

    @retry(stop=stop_after_attempt(2))
    def tries() -> None:
        raise FileNotFoundError("no such set\nmore")

    with pytest.raises(RetryError) as caught:
        tries()
    assert reason(caught.value) == "FileNotFoundError: no such set"
