# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of the versions in constraints.txt these come first: they are the largest.
TORCH ?= torch==2.14.1 torchvision==0.29.1
AREA ?= streams

.PHONY: demo test quick gpu lint install campaign docs clean

demo: $(VENV)/installed
	$(BIN)/tucodec demo --out demo

# Files of tests side by side; JOBS=0: one after the other. More than 2 on two cores, and what measures seconds may
# fail, as tests/test_interrupts.py does. Each process has one thread, unless it asks for more.
JOBS ?= 2
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Before a commit, about a minute: formats of files, entropy coding, measures, allocation, identity of runs.
QUICK := tests/coding tests/codecs/test_tuc.py tests/codecs/test_specifications.py tests/test_metrics.py \
	tests/test_curves.py tests/data/test_plan.py tests/training/test_identity.py tests/training/test_options.py
quick: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK)

# Tests and benches that need a CUDA GPU, within 9 minutes; results in docs/gpu.json. It installs nothing: it takes the
# packages of $(GPU_PYTHON), and names those that are missing. Without a GPU it says so.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) -m tests.gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x $(wildcard slurm/*.sh slurm/localcluster/*.sh experiments/*/*.sh) .ci/run

# Long proofs: seeded, resumable; their counts go to docs/campaigns.json.
campaign: $(VENV)/installed
	$(BIN)/python -m tests.campaigns.$(AREA)

# The documentation as a site in build/site.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --quiet

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/tucodec warmup
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
