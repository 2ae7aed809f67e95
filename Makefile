# Everything a fresh machine needs: `make run` and `make test` create .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-oldest mutants lint hooks docs docs-serve wheel bench-cpu bench-gpu train-llama-tiny clean

help:  ## list the targets
	@awk '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { name = $$0; sub(/:.*/, "", name); text = $$0; sub(/^[^#]*## */, "", text); printf "  %-18s%s\n", name, text }' \
	  $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test,docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@ $(VENV)/.installed

##@ run
run: $(VENV)/.installed  ## install into .venv and run sparsebench with its defaults (ARGS='key=value ...')
	$(BIN)/sparsebench $(ARGS)

train-llama-tiny: $(VENV)/.installed  ## train the embedded model again (resumes; two hours on 2 cores, 3 minutes on a GPU)
	$(BIN)/sparsebench model.weights=scratch $(ARGS)

##@ test
test: $(VENV)/.test  ## install the extras test and docs and run the default test suite (CPU, offline)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.test  ## the tests that take minutes (wheel in an environment of its own, kill and resume)
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

test-oldest:  ## the default test suite with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt -e '.[test,docs]'
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

mutants: $(VENV)/.test  ## break one line at a time in a copy and see the named test fail (ARGS='--only lte --jobs 1')
	$(BIN)/python scripts/mutants.py $(ARGS)

lint: $(VENV)/.test  ## ruff (rules and format) and mypy (strict where contracts are said)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

hooks: $(VENV)/.test  ## check every commit: ruff, mypy, no file over 500 kB
	$(BIN)/pre-commit install

##@ docs
docs: $(VENV)/.docs  ## write the generated pages and build the site into site/ (strict: a broken link fails)
	if [ -f scripts/make_docs_tables.py ]; then $(BIN)/python scripts/make_docs_tables.py; fi
	$(BIN)/python scripts/make_docs_configuration.py
	$(BIN)/python scripts/make_docs_picture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs  ## serve the site while editing it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

##@ bench
bench-cpu: $(VENV)/.installed  ## time kernels and decode at Llama-2-7B's shapes on one CPU thread (about 3 minutes)
	for dtype in float32 bfloat16; do \
	  $(BIN)/sparsebench-bench hardware=cpu hardware.threads=1 hardware.dtype=$$dtype model=llama2-7b model.num_layers=1 \
	    'contexts=[128]' output=outputs/bench/cpu-$$dtype $(ARGS) || exit 1; \
	done

bench-gpu:  ## check and time everything that needs a GPU (PYTHON=, OUT=, HISTOGRAMS=: see scripts/bench_gpu.sh)
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) sh scripts/bench_gpu.sh

##@ release
wheel: $(VENV)/.test  ## build the wheel, install it in an environment of its own, run it from another folder
	$(BIN)/python -m pytest -m slow --timeout 1800 tests/cli/test_wheel.py
	rm -rf build  # setuptools would pack what an older build left there
	$(BIN)/python -m build --wheel

clean:  ## remove what was built (not outputs/)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
