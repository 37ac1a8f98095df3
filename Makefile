# The index of commands: `make help`. Every target works alone on a fresh clone, without a GPU, nvcc or root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) setup.py pyproject.toml
# CUDA kernels are built with FASTMTL_CUDA=1 or auto, where there is a toolkit.
export FASTMTL_CUDA ?= 0
# pytest compiles the tests, and does so once: with this set, each process for itself.
unexport PYTHONDONTWRITEBYTECODE
# Without reordering: files of few tests, which would come last, are long ones.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20
FUZZ_SECONDS ?= 300
# `make wheel` builds against the one torch and tests on the other.
WHEEL_TORCH ?= 2.14.1
WHEEL_RUNS_ON ?= 2.13.0
CPP := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/emulation/*.h tests/emulation/*.cpp tests/emulation/runtime/*.h tests/emulation/devices/*.* tests/sanitize/*.h tests/sanitize/*.cpp \
	tests/sanitize/torch/csrc/stable/*.h)

.DEFAULT_GOAL := help
.PHONY: help install develop demo test test-tools test-experiments test-trainers test-avx2 test-all sanitize fuzz wheel wheel-cuda emulate cuda cuda-all cuda-report gpu bench bench-check bench-engines bench-gate bench-against scaling-quick docs docs-numbers test-site lint lint-style lint-types lint-public-types format clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch ninja numpy 'setuptools>=77' wheel
	@touch $@

# Editable, and built against the very torch that it will run on.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e '.[demo]'
	@touch $@

# What everything but the demo needs; the package itself is there by now.
$(VENV)/.dev: $(VENV)/.built
	$(PIP) install 'fastmtl-torch[dev]'
	@touch $@

install: $(VENV)/.built ## create .venv, install torch and fastmtl, build the CPU kernels

develop: $(VENV)/.dev ## the same, and what tests, benchmarks and experiments need

demo: install ## train on overlaid digits: uniform sum, fastmtl, plain PyTorch; writes demo.png
	$(BIN)/python examples/digits.py

# Of products of parameters the cases that show every pair of values (tests/thinning.py), here and wherever --slow is not given.
TOOLS := tests/sanitize tests/tools tests/packaging tests/scaling tests/csrc

test: develop ## the tests of the library, files in parallel (PYTEST_ARGS="-k gram" for some)
	$(BIN)/python -m pytest $(PARALLEL) $(TOOLS:%=--ignore %) --ignore tests/experiments $(PYTEST_ARGS)

test-tools: develop ## those of the build, command line, docs, examples, benchmarks, scaling study and wheel; kernels under AddressSanitizer
	$(BIN)/python -m pytest $(PARALLEL) $(TOOLS) $(PYTEST_ARGS)

test-experiments: develop ## those of the experiments, and each of them end to end at tiny size, killed and resumed
	$(BIN)/python -m pytest $(PARALLEL) tests/experiments $(PYTEST_ARGS)

# They are not among the others' packages: where transformers is installed, whoever imports Lightning imports it, too.
test-trainers: develop ## those with transformers and PEFT, which it installs
	$(PIP) install 'fastmtl-torch[transformers]' 'peft>=0.17'
	$(BIN)/python -m pytest tests/integrations/test_transformers.py tests/tools/test_trainer_examples.py tests/gramian/test_examples.py \
		-k "trainer or transformers or peft or adapter" $(PYTEST_ARGS)

# What a processor without AVX-512 runs of PyTorch, its libraries and the kernels.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FASTMTL_CPU=avx2
# The numerics, and what stands on matrix products and solvers of others; test_isa.py has the kernels on their own.
AVX2_TESTS := ops/test_adversaries methods/test_aligned ops/test_determinism observe/test_diagnostics gramian/test_gramian \
	ops/test_many_tasks ops/test_qp ops/test_raw_ops ops/test_tridiagonal

test-avx2: develop ## a part of the tests as on a processor without AVX-512
	$(AVX2) $(BIN)/python -m pytest $(PARALLEL) --cover 1 $(AVX2_TESTS:%=tests/%.py) $(PYTEST_ARGS)

test-all: develop ## all of these on every combination of parameters, and the slow ones: wheel, sanitizers, 2^31 parameters
	$(BIN)/python -m pytest $(PARALLEL) --slow $(PYTEST_ARGS)

sanitize: develop ## the CPU kernels and solvers under AddressSanitizer, UBSan and ThreadSanitizer, every instruction set
	$(BIN)/python -m pytest tests/sanitize --slow $(PYTEST_ARGS)

fuzz: develop ## new random inputs for FUZZ_SECONDS (300); what fails is kept in tests/fuzz/corpus
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz -q -s -o faulthandler_timeout=120 $(PYTEST_ARGS)

wheel: develop ## dist/: sdist and, built from it in isolation, the wheel with CPU kernels; then test it on an older torch
	rm -rf dist *.egg-info
	echo 'torch==$(WHEEL_TORCH)' > $(VENV)/wheel-constraint.txt
	PIP_CONSTRAINT=$(abspath $(VENV)/wheel-constraint.txt) $(BIN)/python -m build
	FASTMTL_DIST=dist FASTMTL_WHEEL_RUNS_ON=$(WHEEL_RUNS_ON) $(BIN)/python -m pytest tests/packaging --slow -s $(PYTEST_ARGS)

wheel-cuda: develop ## dist/: the wheel with CUDA kernels too, for every architecture of the design (needs nvcc; half an hour)
	rm -f dist/*+cu*.whl
	echo 'torch==$(WHEEL_TORCH)' > $(VENV)/wheel-constraint.txt
	cuda=cu$$($(BIN)/python -c 'import torch; print(torch.version.cuda.split(".")[0])') && \
	FASTMTL_CUDA=1 FASTMTL_LOCAL_VERSION=$$cuda PIP_CONSTRAINT=$(abspath $(VENV)/wheel-constraint.txt) $(BIN)/python -m build --wheel
	FASTMTL_CUDA_WHEEL='dist/*+cu*.whl' $(BIN)/python -m pytest tests/packaging/test_wheel.py --slow -s -k cuda $(PYTEST_ARGS)

# Every pair of parameters: all combinations, which test-all has, take a day of processor time.
emulate: develop ## every CUDA kernel on the host: three thread orders, AddressSanitizer, ThreadSanitizer (some of it is part of test)
	$(BIN)/python -m pytest $(PARALLEL) tests/emulation --slow --cover 2 $(PYTEST_ARGS)

cuda: ## build with the CUDA kernels (needs nvcc, no GPU) for TORCH_CUDA_ARCH_LIST, default 7.5 and 8.0; import them
	@rm -f $(VENV)/.built
	FASTMTL_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-7.5;8.0}" $(MAKE) develop
	$(BIN)/python -c "import fastmtl; assert fastmtl.ops.EXTENSIONS['_C_cuda'], 'not loaded'"
	$(BIN)/python -m fastmtl info

cuda-all: ## the same for every architecture of the design
	TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX" $(MAKE) cuda

cuda-report: develop ## registers, spills, occupancy and load widths of the compiled kernels (needs nvcc)
	$(BIN)/python tools/cuda_report.py

gpu: develop ## on a machine with an NVIDIA GPU: build for it, test, sanitize and measure in nine minutes; resumes (GPU_ARGS="--rehearse" without one)
	$(BIN)/python tools/gpu.py $(GPU_ARGS)

bench: develop ## every op and step beside plain PyTorch, TorchJD and a LibMTL-style loop, under pytest-benchmark
	$(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

bench-check: develop ## the speed and memory targets: reached or missed (CHECK_ARGS="--only ragged" for some)
	$(BIN)/python benchmarks/check.py $(CHECK_ARGS)

bench-engines: develop ## the engines of backward: steps, memory, and what "auto" takes
	$(BIN)/python benchmarks/engines.py steps
	$(BIN)/python benchmarks/engines.py memory
	$(BIN)/python benchmarks/engines.py grid

bench-gate: develop ## the gate against regressions: quick, tolerates a busy machine (CHECK_ARGS="--repeat 10" for ten passes)
	$(BIN)/python benchmarks/check.py --ci $(CHECK_ARGS)

bench-against: develop ## what COMMIT=... and this tree take for the cases of the gate, built side by side
	$(BIN)/python benchmarks/against.py $(COMMIT)

scaling-quick: install ## a small scaling study: table, JSON, CSV and plots in scaling-quick/
	rm -rf scaling-quick
	$(BIN)/python -m fastmtl scaling --quick --out scaling-quick

docs: develop ## the site, in site/: every page, link and docstring; runs the tutorials
	$(PIP) install 'fastmtl-torch[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Where there is no Chromium, Playwright's own is fetched.
test-site: docs ## the site and a run's report in headless Chromium, on a desk's and a phone's width; pictures in site-pictures/
	$(PIP) install 'fastmtl-torch[site]'
	command -v chromium || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest tests/tools/test_site.py -k browser -rs $(PYTEST_ARGS)

docs-numbers: develop ## the numbers of the documentation, from benchmarks/results
	$(BIN)/python tools/docs_numbers.py

lint: lint-style lint-types lint-public-types ## formatting, lint and types, as CI checks them

lint-style: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

lint-types: develop
	$(BIN)/mypy

lint-public-types: develop
	$(BIN)/python tools/type_completeness.py
	$(BIN)/python -m pyright --pythonpath $(BIN)/python docs/tutorials

format: develop ## put everything into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site site-pictures scaling-quick *.egg-info fastmtl/*.so .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
