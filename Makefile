# make demo | make test | make test-oldest | make test-vllm | make lint | make docs | make gpu: each makes .venv first and
# installs what it needs, once.

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

# vLLM pins transformers below ours: the plugin in integrations/vllm is tested in an environment of its own, with the build for
# CPUs, of 3.4 GB.
VLLM := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
VLLM_CASES := $(abspath .venv-vllm/cases)

# Of `make test-python`.
OTHER := .venv-$(notdir $(PYTHON))

.PHONY: demo test test-oldest test-python test-vllm lint quick docs gpu

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

# Tiny models and what this package makes of them are written first, since vLLM's environment cannot import it.
test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	rm -rf $(VLLM_CASES)
	OMP_NUM_THREADS=1 $(BIN)/python integrations/vllm/tests/make_cases.py $(VLLM_CASES)
	cd integrations/vllm && PRISM_VLLM_CASES=$(VLLM_CASES) LD_PRELOAD=$(abspath .venv-vllm/lib/libiomp5.so) \
		$(abspath $(VLLM))/python -m pytest

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

# PyPI's torchvision and the like are builds for CUDA, which break the import beside torch for CPUs.
$(VLLM_INSTALLED): integrations/vllm/pyproject.toml
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -e 'integrations/vllm[cpu,test]'
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_INSTALLED)
