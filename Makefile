# `make demo` and `make test` do all the set-up they need, in .venv, without root and without a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# With PARALLEL="--numprocesses=3 --dist=loadscope --no-loadscope-reorder" three processes share the rooms of tests.
PARALLEL ?=

.PHONY: demo test lint format clean

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m distil_tl.train run_dir=runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is younger than pyproject.toml exactly when what that file asks for is installed.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
