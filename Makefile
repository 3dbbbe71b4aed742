# `make demo` and `make test` do all the set-up they need, in .venv, without root and without a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Processes that run tests side by side; 0 for none. Most tests with several ranks wait half of the time. On a large
# machine use more.
WORKERS ?= 4
# Processes side by side are fastest with one thread each, and compile Python files only once.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --durations=20 --dist=loadgroup --no-loadscope-reorder

.PHONY: demo test test-fast durations lint format clean

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m distil_tl.train run_dir=runs/demo

test: $(INSTALLED)
	$(PYTEST) --numprocesses=$(WORKERS) $(PYTEST_ARGS)

# Without what starts processes or takes longer than half a second, and without Slurm.
test-fast: $(INSTALLED)
	$(PYTEST) --numprocesses=2 --fast $(PYTEST_ARGS)

# Rewrites tests/durations.json: which tests are slow, and start first.
durations: $(INSTALLED)
	$(PYTEST) --numprocesses=$(WORKERS) --record-durations

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
	@echo 'Installing everything into $(VENV), about 6 GB with PyTorch: minutes; pip says nothing until it is done'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
