# make train            train something real on what is here; ARGS="--depth 56" passes flags on
# make test             run the tests
# make test-fast        run the tests that are quick: under two minutes on two idle cores
# make wheel            build a wheel for all GPUs from 8.0 on into dist/: many minutes, needs no GPU
# make docs             build the documentation into build/site, with warnings as errors
# make gpu-check        whether every kernel is right on this GPU: two minutes, a line a check, selfcheck.json
# make bench            measure operations, kernels, steps and loaders on the GPU, and draw the report
# make kernels-report   registers, spills and shared memory of every CUDA and Triton kernel, and what those of
#                       a training step cost: sectors, conflicts of banks, instructions; needs nvcc, no GPU
# make fuzz             give new bad inputs of every kind to everything; MINUTES=30 says how long
# make kill-test        kill and resume runs at random moments, half under torchrun; RUNS=100 kills
# make lint             ruff, mypy and clang-format, as pre-commit runs them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CXX_SOURCES := $(shell find csrc -type f)

# Without a GPU the paper's recipe takes hours: a short run on part of the data then. ARGS overrules.
HAS_GPU = $(shell $(BIN)/python -c "import torch; print(int(torch.cuda.is_available()))")
CPU_ARGS := --depth 8 --limit 10000 --epochs 10 --batch-size 128 --lr 0.2 --warmup-epochs 1 \
  --milestones 7 9

.PHONY: train test test-fast wheel docs gpu-check bench kernels-report fuzz kill-test lint
train: $(INSTALLED)
ifeq ($(strip $(ARGS)),)
	@if [ "$(HAS_GPU)" = 0 ]; then \
	  echo "No GPU: a short run on part of the data. The whole recipe: make train ARGS=\"--depth 20\""; \
	  set -x; $(BIN)/python -m cifar_resnet_fast.train $(CPU_ARGS); \
	else set -x; $(BIN)/python -m cifar_resnet_fast.train; fi
else
	$(BIN)/python -m cifar_resnet_fast.train $(ARGS)
endif

# Without a GPU two processes share the tests; with one, a single process has all of its memory.
JOBS = $(if $(filter 0,$(HAS_GPU)),2,0)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

wheel: $(INSTALLED)
	tools/wheel.sh $(VENV)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu-check: $(INSTALLED)
	$(BIN)/python -m cifar_resnet_fast.selfcheck --device cuda $(ARGS)

bench: $(INSTALLED)
	for suite in kernels trunk step loader; do \
	  $(BIN)/python -m bench.$$suite --quick || [ $$? = 1 ] || exit; done # 1: a row says what failed
	$(BIN)/python -m bench.report

kernels-report: $(INSTALLED)
	$(BIN)/python -m tools.ptxas_report
	$(BIN)/python -m tools.triton_report
	PYTHONPATH=tests:. $(BIN)/python -m ptx.counts

MINUTES ?= 30
fuzz: $(INSTALLED)
	FUZZ_MINUTES=$(MINUTES) FUZZ_TABLE=fuzz.jsonl \
	  $(BIN)/python -m pytest -s -o timeout=0 tests/fuzz/test_inputs.py
	cat fuzz.jsonl

RUNS ?= 100
kill-test: $(INSTALLED)
	KILL_RUNS=$(RUNS) $(BIN)/python -m pytest -o timeout=0 tests/fuzz/test_kills.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

$(INSTALLED): pyproject.toml setup.py $(CXX_SOURCES)
	@PYTHON="$(PYTHON)" tools/install.sh $(VENV)
	@touch $@
