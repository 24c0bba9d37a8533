"""`python -m quota.bench.gpu` (make gpu-check): build, check and time the CUDA side; one JSON and one Markdown report.

Every section runs in a process of its own: one that fails, crashes or runs out of time is reported, and the others go on. With `--dry-run` everything that
needs no GPU is done (commands are found, every check's inputs are made and the CPU implementation is compared in the GPU's place) and the rest is listed.
On a machine whose calls are limited, give part of the sections to each: `--sections machine,build,sass,ops`; results of sections run before are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quota.bench.gpu.serving import serving
from quota.core.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "triton", "transformers", "humming-kernels", "flash-attn", "pydantic", "nvidia-ml-py")
_TOOLS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Options:
    """dry: no GPU. seed: of all random inputs. small: the sizes of the sanitizer."""

    dry: bool
    seed: int
    small: bool


def _shell(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output[-3000:]}")
    return output


def _require(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"{program} is not on PATH")
    return found


def _require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise RuntimeError(f"{name} is not installed, and this section needs it: pip install {name}")


def _require_library() -> None:
    from quota.ops import cuda

    if reason := cuda.why_not():  # None also means: it is loaded now
        raise RuntimeError(reason)


def machine(options: Options) -> dict[str, Any]:
    """What is here: GPU, driver, compiler, packages."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    found: dict[str, Any] = {"python": platform.python_version(), "packages": versions, "torch_cuda": torch.version.cuda}
    if shutil.which("nvcc"):
        found["nvcc"] = _shell(["nvcc", "--version"]).strip().splitlines()[-1]
    if options.dry:
        return found
    found["smi"] = _shell([_require("nvidia-smi"), "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv,noheader"]).strip()
    facts = torch.cuda.get_device_properties(0)
    return found | {"name": facts.name, "arch": f"{facts.major}.{facts.minor}", "processors": facts.multi_processor_count, "l2_bytes": facts.L2_cache_size}


def build(options: Options) -> dict[str, Any]:
    """Both libraries, for this GPU's architecture alone."""
    import torch

    _require("nvcc")
    major, minor = (9, 0) if options.dry else torch.cuda.get_device_capability()
    archs = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if options.dry:
        return {"would_run": f"QUOTA_BUILD=cuda QUOTA_CUDA_ARCHS={archs} {' '.join(command)}"}
    began = time.perf_counter()
    _shell(command, QUOTA_BUILD="cuda", QUOTA_CUDA_ARCHS=archs)
    return {"archs": archs, "seconds": time.perf_counter() - began}


def sass(options: Options) -> dict[str, Any]:
    """The intended instructions are there and nothing spills."""
    from quota.bench.sass import cuobjdump, kernels, table
    from quota.ops.cuda import LIBRARY

    if options.dry and not LIBRARY.exists():
        return {"would_run": f"python -m quota.bench.sass {LIBRARY.relative_to(ROOT)}", "cuobjdump": Path(cuobjdump()).name}
    found = kernels([LIBRARY])
    faults = [f"{k.name} {k.arch}: {fault}" for k in found if (fault := k.fault())]
    return {"table": table(found), "failures": faults, "kernels": len(found)}


def ops(options: Options) -> dict[str, Any]:
    """Every op of the CUDA library against the reference on the CPU."""
    import torch

    from quota.bench.gpu import checks

    found = _compared(options, "cuda")
    if not options.dry:
        native4 = torch.cuda.get_device_capability()[0] == 8
        for title, difference in checks.ways(options.seed, "cuda", native4):
            found["checks"] += 1
            if difference:
                found["failures"].append(f"{title}: {difference}")
    return found


def triton(options: Options) -> dict[str, Any]:
    """Every op of the Triton kernels against the reference on the CPU; the kernels are compiled at their first call."""
    return _compared(options, "triton")


def _compared(options: Options, implementation: str) -> dict[str, Any]:
    import torch

    from quota.bench.gpu import checks
    from quota.core.registry import Context

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    device, failures, count = ("cpu" if options.dry else "cuda"), [], 0
    for check in checks.all_checks(options.seed, options.small or options.dry):
        offered = next((i for i in check.op.implementations if i.name == implementation), None)
        if offered is None:
            continue
        if not options.dry and (reason := offered.supports(Context("cuda"))):
            raise RuntimeError(f"{check.op.name}: {reason}")
        difference, count = checks.run(check, device, "ref" if options.dry else implementation), count + 1
        if difference:
            failures.append(f"{check.title}: {difference}")
    return {"checks": count, "failures": failures, "seed": options.seed, "device": device}


def sanitizer(options: Options) -> dict[str, Any]:
    """compute-sanitizer over the small checks: accesses, races, reads of what nobody wrote."""
    commands = {tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "quota.bench.gpu", "--sections", "ops", "--small",
                       "--worker", "--seed", str(options.seed)] for tool in _TOOLS}  # fmt: skip
    if options.dry:
        return {"would_run": [" ".join(command[:5]) + " ..." for command in commands.values()]}
    _require("compute-sanitizer")
    results, failures = {}, []
    for tool, command in commands.items():
        try:  # torch's caching allocator hides what is out of bounds of a tensor
            results[tool] = _shell(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1").strip().splitlines()[-1]
        except RuntimeError as error:
            failures.append(f"{tool}: {error}")
    return {"tools": results, "failures": failures}


def graph(options: Options) -> dict[str, Any]:
    """A decode step's kernels captured once and replayed on other inputs and other lengths: nothing synchronises, nothing is baked in."""
    from quota.bench.gpu import checks

    if options.dry:
        return {"would_run": "capture of quantize_act, w4a4_linear, qkv_append and kv4_paged_attention; three replays compared with eager calls"}
    import torch

    from quota.ops import cuda

    _require_library()
    g = torch.Generator().manual_seed(options.seed)
    x, left, right, clip, _ = checks._to(checks._quantize(g, 4, 64, 64, None), "cuda")
    weight = checks._to(checks._linear(g, 4, 4096, 768)[2], "cuda")
    q, k, v, table, length, scaling = checks._to(checks._paged(g, 4, 2, 64), "cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return cuda.w4a4_linear(*cuda.quantize_act(x, left, right, clip), weight), cuda.kv4_paged_attention(q, k, v, table, length, scaling)[0]

    step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    failures = []
    for i, lengths in enumerate(([5, 600, 0], [33, 1, 640], [0, 0, 16])):
        x.normal_(), q.normal_(), length.copy_(torch.tensor(lengths, dtype=torch.int32))
        captured.replay()
        if not all(torch.equal(a, b) for a, b in zip(results, step(), strict=True)):
            failures.append(f"replay {i} differs from the eager calls")
    return {"replays": 3, "failures": failures}


def engine(options: Options) -> dict[str, Any]:
    """The engine's own tests; those marked `gpu` need the device."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/engine", "tests/runtime", "-m", "gpu or not slow", "-p", "no:cacheprovider"]
    if options.dry:
        return {"would_run": " ".join(command[1:])}
    for name in ("pydantic", "pytest"):
        _require_package(name)
    return {"summary": _shell(command).strip().splitlines()[-1]}


def answers(options: Options) -> dict[str, Any]:
    """The embedded model, rounded to 4 bits, answers on the device what it answers on the CPU."""
    if options.dry:
        return {"would_run": "24 questions of the embedded model on both devices, token by token"}
    from quota.core import images
    from quota.eval.asking import ask
    from quota.models.rtn import quantize_rtn
    from quota.runtime.load import load
    from quota.scenes import assets

    samples = json.loads((assets.SAMPLES.parent / "samples.json").read_text())["samples"][:24]
    texts: dict[str, list[str]] = {}
    for device in ("cpu", "cuda"):
        model = quantize_rtn(load(assets.CHECKPOINT)).eval().to(device)
        texts[device] = []
        for sample in samples:
            picture = images.open_file(assets.SAMPLES.parent / sample["image"])
            texts[device].append(ask(model, model.processor, sample["instruction"], [picture], max_new_tokens=12).text)
    different = [f"{s['id']}: CPU {a!r}, GPU {b!r}" for s, a, b in zip(samples, texts["cpu"], texts["cuda"], strict=True) if a != b]
    return {"questions": len(samples), "failures": different}


def _timings(options: Options, rows: Callable[[], list[dict[str, Any]]], plan: list[str]) -> dict[str, Any]:
    if options.dry:
        return {"would_time": plan}
    _require_library()
    return {"rows": rows()}


def linears(options: Options) -> dict[str, Any]:
    """w4a4_linear beside cuBLAS bf16, int8, FP8 on projections of 7B models."""
    from quota.bench.gpu import times

    cases = [(shape, m) for model in times.FULL for shape in model.linears() for m in times.ROWS]
    return _timings(options, lambda: [{"case": f"{s.name} M={m}", "m": m, **row} for s, m in cases for row in times.linear_rows(s, m)],
                    [f"{s.name} M={m}" for s, m in cases])  # fmt: skip


def humming(options: Options) -> dict[str, Any]:
    """w4a4_linear beside humming's W4A8, where humming-kernels is installed; it compiles each size."""
    from quota.bench.gpu import peers, times

    if reason := peers.why_not_humming():
        return {"absent": reason}
    cases = [(shape, m) for model in times.FULL for shape in model.linears() for m in times.FEW_ROWS]
    return _timings(options, lambda: [{"case": f"{s.name} M={m}", "m": m, **row} for s, m in cases for row in times.humming_rows(s, m)],
                    [f"{s.name} M={m}" for s, m in cases])  # fmt: skip


def attention(options: Options) -> dict[str, Any]:
    """Decode attention beside SDPA and flash-attn in bf16."""
    from quota.bench.gpu import times
    from quota.bench.shapes import ATTENTIONS

    cases = [(a, b, s) for a in ATTENTIONS if a.name in {m.name for m in times.FULL} for b, s in times.CONTEXTS]
    return _timings(options, lambda: [{"case": f"{a.name} B={b} S={s}", **row} for a, b, s in cases for row in times.attention_rows(a, b, s)],
                    [f"{a.name} B={b} S={s}" for a, b, s in cases])  # fmt: skip


def layer(options: Options) -> dict[str, Any]:
    """What transforming and quantizing takes, as a share of a layer's linears."""
    from quota.bench.gpu import times

    plan = [f"{model.name} M={m}" for model in times.FULL for m in times.FEW_ROWS]
    return _timings(options, lambda: [row for m in times.FEW_ROWS for row in times.layer_rows(m)], plan)


def models(options: Options) -> dict[str, Any]:
    """Whole LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights: first token, tokens per second, memory and power, beside transformers in bf16."""
    from quota.bench.gpu import models

    sizes = models.Sizes()
    if options.dry:
        names = [f"{name}{kept}" for name in ("quota", "quota, engine") for kept in ("", f", keep {models.KEEP:g}")] + ["transformers bf16"]
        return {"would_time": [f"{arch} B={batch}: {name}" for arch in models.ARCHS for batch in sizes.batches for name in names]}
    _require_library()
    found = [row for arch in models.ARCHS for row in models.rows(arch, sizes)]
    return {"rows": found, "table": models.table(found), "failures": models.failures(found)}


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    f.__name__: f for f in (machine, build, sass, ops, triton, sanitizer, graph, engine, answers, linears, humming, attention, layer, models, serving)
}


def _worker(name: str, options: Options) -> int:
    """One section in this process; its result as the last line."""
    result = SECTIONS[name](options)
    print(json.dumps(result))
    return 1 if result.get("failures") else 0


def _dry(name: str, options: Options) -> dict[str, Any]:
    """Without a GPU no section can crash the process: no need for one of its own."""
    try:
        return SECTIONS[name](options)
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {error}"]}


def _apart(name: str, options: Options, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "quota.bench.gpu", "--worker", "--sections", name, "--seed", str(options.seed), *(["--small"] if options.small else [])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code: int | str = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = f"longer than {limit_s:.0f} s"
        out.seek(0), err.seek(0)
        lines, errors = out.read().strip().splitlines(), err.read()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = {}
    if code != 0 and not found.get("failures"):
        found["failures"] = [f"ended with {code}: {errors.strip()[-1500:]}"]
    return found


def _run(name: str, options: Options, limit_s: float) -> dict[str, Any]:
    began = time.perf_counter()
    found = _dry(name, options) if options.dry else _apart(name, options, limit_s)
    passed = not found.get("failures")
    return {"section": name, "dry_run": options.dry, "passed": passed, "seconds": round(time.perf_counter() - began, 1)} | found


def _times_markdown(rows: list[dict[str, Any]]) -> list[str]:
    ours = {r["case"]: r["us"] for r in rows if r.get("implementation") == "quota" and "us" in r}
    lines = ["| case | implementation | us | times ours |", "| --- | --- | --: | --: |"]
    for r in rows:
        ratio = f"{r['us'] / ours[r['case']]:.2f}" if "us" in r and r["case"] in ours else ""
        value = format(r["us"], ".1f") if "us" in r else r["failed"]
        lines.append(f"| {r['case']} | {r['implementation']} | {value} | {ratio} |")
    return lines


def markdown(records: list[dict[str, Any]]) -> str:
    """The report: one line per section, then failures, plans and tables."""
    lines = ["# GPU check", "", "| section | result | seconds |", "| --- | --- | --: |"]
    for r in records:
        state = "FAILED" if not r["passed"] else "planned" if r["dry_run"] else "passed"
        lines.append(f"| {r['section']} | {state} | {r['seconds']} |")
    for r in records:
        lines += ["", f"## {r['section']}", "", SECTIONS[r["section"]].__doc__ or "", ""]
        lines += [f"- FAILED: {failure}" for failure in r.get("failures", [])]
        if "table" in r:
            lines.append(r["table"])
        elif r.get("rows") and "case" in r["rows"][0]:
            lines += _times_markdown(r["rows"])
        else:
            shown = {k: v for k, v in r.items() if k not in ("section", "dry_run", "seconds", "passed", "failures")}
            lines += ["```json", json.dumps(shown, indent=1), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quota.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"comma-separated, in this order: {', '.join(SECTIONS)}")
    parser.add_argument("--dry-run", action="store_true", help="do what needs no GPU, list the rest")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all random inputs; default: the clock, written to the report")
    parser.add_argument("--limit-s", type=float, default=540, help="longest time of one section (default 540)")
    parser.add_argument("--small", action="store_true", help="only the sizes that compute-sanitizer gets through")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of gpu.json and gpu.md (default benchmarks/results)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = Options(given.dry_run, given.seed, given.small)
    names = given.sections.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: unknown section {unknown[0]!r}; expected some of {', '.join(SECTIONS)}")
    if given.worker:
        return _worker(names[0], options)
    stem = "gpu-dry-run" if options.dry else "gpu"
    path = given.out / f"{stem}.json"
    records = {r["section"]: r for r in (json.loads(path.read_text()) if path.exists() else [])}
    for name in names:
        record = records[name] = _run(name, options, given.limit_s)
        done = [records[n] for n in SECTIONS if n in records]
        given.out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(done, indent=1) + "\n")
        atomic_write_text(given.out / f"{stem}.md", markdown(done))
        state = "passed" if record["passed"] else "FAILED"
        print(f"{name:10} {state:7} {record['seconds']:7.1f} s  {'; '.join(record.get('failures', []))[:300]}", flush=True)
    print(f"report: {given.out / f'{stem}.md'}")
    return 0 if all(records[name]["passed"] for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
