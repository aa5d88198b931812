# Everything starts from here: `make demo`, `make test`. Each makes .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The third Keras backend the tests run on. PyPI's build for x86-64 brings CUDA, several GB: `make test TORCH=` does
# without, and skips its tests.
TORCH  ?= torch==2.13.0
MAKEFLAGS += --no-print-directory

.PHONY: help demo test test-slow lint bench notebooks docs clean
help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## train XGBoost and Keras on 336,776 real flights, on a local Dask cluster
	$(BIN)/dask bridges demo

test: $(VENV)/.dev  ## the tests, short settings
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev  ## the long settings: kill matrices, soaks; some of them with K="expression"
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 -o faulthandler_timeout=1700 $(if $(K),-k "$(K)")

lint: $(VENV)/.dev  ## ruff, mypy --strict, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## the benchmarks, each beside its peer, to docs/benchmarks.md; some of them with ONLY="names"
	$(BIN)/python benchmarks/run.py $(ONLY)

notebooks: $(VENV)/.dev  ## execute the notebooks and keep their outputs; one of them with N=path
	$(BIN)/python notebooks/execute.py $(N)

docs: $(VENV)/.dev  ## the documentation, to docs/_build/html
	$(PIP) install --quiet -e ".[docs]"
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

clean:  ## remove what make made
	rm -rf $(VENV) docs/_build docs/notebooks dist demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[xgboost-cpu,keras-cpu,demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[dev,xgboost-cpu,tensorflow-cpu,keras-cpu]" $(TORCH)
	@touch $@ $(VENV)/.demo
