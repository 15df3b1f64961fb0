# Two commands do everything on a fresh machine with Python >= 3.10, g++ and make:
#
#   make run     virtual environment, build, then the main job on the bundled example
#   make test    the same set-up, then the tests
#
# A second call does only what changed. Variables: PYTHON=python3.12, VENV=.venv, PYTEST_ARGS="-k cli", WORKERS=0 (tests in
# one process, as a debugger wants them), BENCH_DIR=/nvme/kv, BENCH_ARGS="--rounds 5".

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
BENCH_DIR ?= build/bench
BENCH_ARGS ?= --quick
ACCURACY_ARGS ?= --quick
FUZZ_SECONDS ?= 60
CLANG ?= clang++

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Passive: the models of the tests are tiny, and torch's waiting threads would spin on cores that others need. By file: what
# a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PASSIVE := OMP_WAIT_POLICY=passive
SANITIZED := $(MAKE) --silent -j$(shell nproc) -f tests/native/Makefile
EXAMPLE := build/example
FORCED_TESTS := tests/hf tests/test_attention.py tests/test_store.py tests/test_tensor.py tests/test_ops.py
# Of weights in files, what neither computes by our kernels nor differs by I/O engine (their streams run under both anyway).
NOT_FORCED := $(addprefix --ignore=tests/hf/test_,checkpoint.py checkpoint_loading.py batching.py)
# On an emulated card kernels take milliseconds where a card takes microseconds, and seconds to be compiled for each geometry.
CARD_TESTS := tests/cuda tests/hf/test_cache.py tests/hf/test_generation.py tests/hf/test_quantised.py
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
KERNELS := $(wildcard torch_csd/cuda/kernels/*.cu torch_csd/cuda/kernels/*.cuh tests/emulation/*.h)
# The budget is a fraction of the example's cache, so that most of it must lie on the drive.
EXAMPLE_FLAGS := --max-new-tokens 8 --memory-budget 8MiB

.PHONY: run test test-forced sanitize fuzz bench build lint format clean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo 'make run          set up, build, and let the bundled example answer from its KV cache on the drive'
	@echo 'make test         set up, build, and run the tests'
	@echo 'make test-forced  the same tests with each slower instruction set and I/O engine forced'
	@echo 'make sanitize     the programs of tests/native under AddressSanitizer, UBSan and ThreadSanitizer: minutes'
	@echo 'make fuzz         clang and libFuzzer on what is read from files, for FUZZ_SECONDS=$(FUZZ_SECONDS)'
	@echo 'make bench        a short run of every benchmark, in BENCH_DIR=$(BENCH_DIR): minutes, and no bars'
	@echo 'make build        set up and build only'
	@echo 'make lint         ruff and clang-format, changing nothing'
	@echo 'make format       ruff and clang-format, in place'
	@echo 'make clean        remove what was built, the virtual environment included'

run: build $(EXAMPLE)/model/prompts.jsonl
	@rm -f $(EXAMPLE)/output.jsonl
	@mkdir -p $(EXAMPLE)/kv
	$(BIN)/torch-csd generate --model $(EXAMPLE)/model --prompts $(EXAMPLE)/model/prompts.jsonl \
	  --kv-dir $(EXAMPLE)/kv --output $(EXAMPLE)/output.jsonl $(EXAMPLE_FLAGS)
	@$(BIN)/python tools/compare_with_memory.py $(EXAMPLE)/model $(EXAMPLE)/model/prompts.jsonl $(EXAMPLE)/output.jsonl

test: build $(VENV)/.gpu-tools
	$(PASSIVE) $(PYTEST) $(PYTEST_ARGS)

# Everything that computes, again on each path that this machine would not choose by itself, an emulated card included. Not
# avx512 where there is avx512vnni: it differs in one instruction, and the tests of kernels and of attention run under each
# anyway.
test-forced: build $(VENV)/.gpu-tools
	@for simd in $$($(BIN)/python -c 'from torch_csd import ops; print(*[s for s in ops.supported_simd()[:-1] if s != "avx512"])'); do \
	  echo "TORCH_CSD_SIMD=$$simd"; \
	  $(PASSIVE) TORCH_CSD_SIMD=$$simd $(PYTEST) -q $(FORCED_TESTS) $(NOT_FORCED) || exit 1; \
	done
	$(PASSIVE) TORCH_CSD_IO_ENGINE=pread $(PYTEST) -q $(FORCED_TESTS) tests/test_file_tensor.py $(NOT_FORCED)
	$(PASSIVE) TEST_CARD=gpu TEST_CARD_BUDGET=256KiB $(PYTEST) -q $(CARD_TESTS)

# Any report fails it. What kernel and program share (io_uring's rings, buffers of requests) needed no suppression:
# ThreadSanitizer sees only the program's side of it. It runs a tenth of the faults, at fifteen times the time of each.
sanitize:
	+@$(SANITIZED) OUT=build/sanitize/address \
	  SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer' check
	+@$(SANITIZED) OUT=build/sanitize/thread SANITIZE=-fsanitize=thread CASES='decode durable fill' check

# The parsers of headers and page tables. What it finds lies in build/fuzz; the corpus grows there, not in tests/.
fuzz:
	@command -v $(CLANG) > /dev/null || { echo 'make fuzz needs clang with libFuzzer: CLANG=clang++-19'; exit 1; }
	@mkdir -p build/fuzz/corpus
	$(CLANG) -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc \
	  tests/native/fuzz_format.cpp csrc/store/format.cpp csrc/store/table.cpp csrc/base/error.cpp \
	  csrc/base/checksum.cpp -o build/fuzz/fuzz_format
	build/fuzz/fuzz_format -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ -print_final_stats=1 \
	  build/fuzz/corpus tests/native/corpus

# For figures that mean something: BENCH_ARGS= ACCURACY_ARGS= on a machine that does nothing else.
bench: build
	@mkdir -p $(BENCH_DIR)
	@for command in io attention sparse decode prefill weights; do \
	  $(BIN)/torch-csd bench $$command --directory $(BENCH_DIR) $(BENCH_ARGS) || exit 1; echo; \
	done
	$(BIN)/torch-csd bench accuracy --directory $(BENCH_DIR) $(ACCURACY_ARGS)

build: $(VENV)/.built

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(KERNELS) $(wildcard tests/native/*.cpp tests/native/*.c)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(KERNELS) $(wildcard tests/native/*.cpp tests/native/*.c)

clean:
	rm -rf build dist *.egg-info torch_csd/*.so $(VENV)

# ---- what the targets above stand on; each stamp lies in the environment, so that both go together ----

$(VENV)/bin/python:
	@tools/check-machine $(PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) setuptools wheel packaging ninja torch
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

# Only the tests want these. --no-deps: kvikio and CuPy ask for the wheels of a whole CUDA toolkit, gigabytes that do nothing
# without a GPU. A torch built for CUDA has brought them anyway, in its own versions, and gets the real thing.
$(VENV)/.gpu-tools: tests/gpu-tools.txt $(VENV)/.torch
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	  $(PIP) kvikio-cu13 cupy-cuda13x cuda-bindings; \
	else \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/gpu-tools.txt; \
	fi
	@touch $@

$(VENV)/.built: setup.py $(NATIVE) $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(EXAMPLE)/model/prompts.jsonl: $(wildcard torch_csd/example/*.py torch_csd/example/recall/*) | $(VENV)/.built
	$(BIN)/python -m torch_csd.example --output $(EXAMPLE)/model
