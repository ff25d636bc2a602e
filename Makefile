# make demo | make test | make lint: each makes .venv first and installs what it needs, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two test processes with one thread each fill a small machine and leave the rest of a large one alone.
PYTEST_PROCESSES ?= 2
# A process that has nothing left takes tests over from one that is held up, as by kernels that are compiled anew.
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal

.PHONY: demo test lint quick

demo: $(INSTALLED)
	$(BIN)/transformers-prism demo

test: lint
	OMP_NUM_THREADS=1 $(PYTEST)

quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -m quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch goes in alone and pinned: left to itself, pip may fetch another release and gigabytes of libraries for it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $(INSTALLED)
