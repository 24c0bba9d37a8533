"""`import quota` is cheap, and `import quota.ops` works without the native library and without transformers."""

import subprocess
import sys

import pytest


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


@pytest.mark.parametrize(
    ("module", "absent"), [("quota", ("torch", "transformers", "triton")), ("quota.ops", ("transformers", "triton"))]
)
def test_import_pulls_in_no_more_than_needed(module: str, absent: tuple[str, ...]) -> None:
    result = run(f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_running_a_model_needs_no_parser_of_documents() -> None:
    result = run(
        "import sys; sys.modules['pydantic'] = None\nimport quota.nn, quota.runtime.load, quota.eval.asking,"
        " benchmarks.gpu.command"
    )
    assert result.returncode == 0, result.stderr  # CUDA images have torch and transformers, not always pydantic


def test_references_run_without_the_library_after_one_warning() -> None:
    result = run(
        "import pathlib, torch, quota.ops as ops\nfrom quota.ops import native\nnative._LIBRARY ="
        " pathlib.Path('nowhere.so')\nfor _ in range(2): ops.quantize_act(torch.ones(2, 4), None, None, 1.0);"
        " ops.transform(torch.ones(2, 4), ops.Factor(torch.eye(2)), None)\n"
        "print(ops.quantize_act.choose().name, native.describe())"
    )
    assert result.returncode == 0 and result.stdout.startswith("ref the native CPU library is not built")
    assert result.stderr.count("slow reference implementations") == 1 and "QUOTA_BUILD=cpu" in result.stderr


def test_forced_native_without_the_library_is_an_error() -> None:
    result = run(
        "import pathlib, torch, quota.ops as ops\n"
        "from quota.ops import native\n"
        "native._LIBRARY = pathlib.Path('nowhere.so')\n"
        "ops.transform(torch.ones(2, 4), None, None)",
        QUOTA_IMPL="transform=native",
    )
    assert (
        result.returncode and "transform=native cannot run here: the native CPU library is not built" in result.stderr
    )


def test_forced_instruction_set() -> None:
    code = (
        "import torch, quota.ops as ops\nfrom quota.ops import native\nops.transform(torch.ones(2, 4),"
        " ops.Factor(torch.eye(2)), None)\nprint(native.describe())"
    )
    result = run(code, QUOTA_CPU_ISA="portable")
    assert result.returncode == 0 and ("instruction set portable" in result.stdout or "not built" in result.stdout)
    result = run(code, QUOTA_CPU_ISA="sse9")
    assert result.returncode and "QUOTA_CPU_ISA: expected one of" in result.stderr
