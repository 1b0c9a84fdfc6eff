# Needs Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# JAX looks for accelerators by itself; tests and the demo run on the CPU everywhere alike.
CPU := JAX_PLATFORMS=cpu
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Files of tests go to three processes, on two cores: most of a test is one thread, compiling, and a quarter of the time
# is spent waiting for what was started, killed or timed.
TOGETHER := -n 3 --dist loadfile --no-loadscope-reorder
# What `make test` and `make test-light` run; `make test-slow` runs the rest.
MARKS := not slow
PINS := $(wildcard constraints/python$(VERSION).txt)

.PHONY: setup run test test-slow test-light test-full docs lint goldens clean

setup: $(VENV)/test.stamp

# What was tested is pinned by constraints/; another Python version takes the newest that fits. Python compiles modules as
# they are imported, a fraction of what is installed.
$(VENV)/%.stamp: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check $(PINS:%=-c %) -e '.[$*]'
	touch $@

run: setup
	$(CPU) $(BIN)/python scripts/demo.py

# Ten minutes: each part of the package, and one case of what takes long.
test: setup
	$(CPU) $(BIN)/python -m pytest $(TOGETHER) -m '$(MARKS)'

# Half an hour: runs that are killed, several processes, compilers of TPUs, the demo model, every case of the rest.
test-slow: setup
	$(CPU) $(BIN)/python -m pytest $(TOGETHER) -m slow

# What compilers take longest for, plans, training and decoding at SmolLM3's full depth, for pods too, and more of what
# is drawn at random. (Compiled for GPUs: FULL=1 make test-light MARKS=gpu, on Python 3.12.)
test-full: setup
	FULL=1 $(CPU) $(BIN)/python -m pytest $(TOGETHER) -m full
	FULL=1 $(CPU) $(BIN)/python -m pytest tests/test_docs.py

# `make test` in an environment without torch and transformers: parity is that with the stored goldens. TESTS="kernels test_model.py"
# names some of tests/; all, where it names none.
test-light: $(VENV)/dev.stamp
	$(CPU) $(BIN)/python -m pytest $(TOGETHER) -m 'not torch and ($(MARKS))' $(TESTS:%=tests/%)

# Pages of docs/ in docs/_build; a warning is an error.
docs: $(VENV)/docs.stamp
	$(CPU) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Written by transformers, read by test-light.
goldens: setup
	WRITE_GOLDENS=1 $(CPU) $(BIN)/python -m pytest -k golden

clean:
	rm -rf $(VENV) .venv-light build dist docs/_build *.egg-info
