# make demo | make test | make test-oldest | make lint | make docs | make gpu: each makes .venv
# first and installs what it needs, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two test processes with one thread each fill a small machine and leave the rest of a large one alone.
PYTEST_PROCESSES ?= 2
# A process that has nothing left takes tests over from one that is held up, as by kernels that are compiled anew.
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal

# The oldest release of transformers that pyproject.toml allows, in an environment that has all else from .venv.
OLDEST_TRANSFORMERS := 5.23.0
OLDEST := .venv-oldest/bin
OLDEST_INSTALLED := .venv-oldest/.installed
OLDEST_TESTS := $(patsubst %,tests/test_%.py,lossless cache target_side transformers_names target_support round_check hub renewal published_set reference serving)

# Of `make test-python`.
OTHER := .venv-$(notdir $(PYTHON))

.PHONY: demo test test-oldest test-python lint quick docs gpu

demo: $(INSTALLED)
	$(BIN)/transformers-prism demo

test: lint
	OMP_NUM_THREADS=1 $(PYTEST)

# What differs between releases: losslessness, caches, loading and saving, and the reference vectors.
test-oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal $(OLDEST_TESTS)

# Losslessness on another Python: make test-python PYTHON=python3.13
test-python:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal tests/test_lossless.py

quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -m quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# On a machine with CUDA, where .venv has PyPI's torch: gpu-report.json and gpu-report.png, in less than eight minutes.
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

# The documentation site, in site/; a broken link or reference is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch goes in alone and pinned: left to itself, pip may fetch another release and gigabytes of libraries for it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $(INSTALLED)

# The second environment sees what is installed in the first, but for its own transformers: nothing is fetched twice.
$(OLDEST_INSTALLED): $(INSTALLED)
	rm -rf .venv-oldest
	$(BIN)/python -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check --no-deps transformers==$(OLDEST_TRANSFORMERS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(OLDEST)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth
	test "$$($(OLDEST)/python -c 'import transformers; print(transformers.__version__)')" = $(OLDEST_TRANSFORMERS)
	touch $(OLDEST_INSTALLED)
