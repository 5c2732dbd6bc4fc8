# Two commands need nothing but Python 3.11 or later, pip and make: `make demo` and `make test`.
# Each makes its own virtual environment in .venv from the pinned constraints.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-peer compare-mergekit test-gpu test-wheel lint zoo clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

# Two processes, each with whole files: fixtures of a file are made once.
test: $(READY) lint
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile
	$(BIN)/python tests/packaging/check_wheel.py

# The suites that need minutes, another project's environment, or a GPU.
test-slow: $(READY)
	$(BIN)/pytest -q -m slow

test-peer: $(READY)
	$(BIN)/pytest -q -m peer

# Every recipe of the compatibility corpus here and in mergekit 0.1.5; rewrites the table in docs/mergekit.md.
compare-mergekit: $(READY)
	$(BIN)/python benchmarks/compare_mergekit.py

test-gpu: $(READY)
	$(BIN)/pytest -q -m gpu

lint: $(READY)
	$(BIN)/ruff check -q .
	$(BIN)/mypy

# Trains every example model again (an estimated twenty minutes on two cores); see examples/README.md.
zoo: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[zoo]'
	$(BIN)/python examples/zoo/build.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
