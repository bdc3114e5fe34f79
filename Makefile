# make demo | test | test-slow | lab | docs | help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lab docs lint sync readme export clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## create .venv with everything, the embedded models too

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: need Python 3.11 or newer, e.g. make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/llama-dialogue models get smollm2-135m
	$(BIN)/llama-dialogue models get minilm-bert
	@touch $@

demo: $(READY) ## steer real replies towards each act: a table and a figure
	$(BIN)/llama-dialogue demo

test: $(READY) lint sync ## everything that CI runs
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal
	$(MAKE) --no-print-directory docs

test-slow: $(READY) ## the slow tests, and the notebook cells flagged slow
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow
	HF_HUB_OFFLINE=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_test --flags slow --n_workers 1 --timing

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

sync: $(READY)
	@before=$$(git diff | sha256sum; git status --porcelain | sha256sum); \
	$(MAKE) --no-print-directory export || exit 1; \
	after=$$(git diff | sha256sum; git status --porcelain | sha256sum); \
	test "$$before" = "$$after" || { git status --short; echo "the package, the notebooks or README.md were not in sync: they are now, commit them"; exit 1; }

export: $(READY) ## notebooks -> package and README.md, notebooks cleaned
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/_sphinx/readme.py

lab: $(READY) ## open JupyterLab in nbs/
	cd nbs && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/jupyter lab

docs: $(READY) ## build the site into _docs/html
	$(BIN)/python -m sphinx --quiet -W --keep-going -c nbs/_sphinx nbs _docs/html
	@echo "open _docs/html/index.html"

clean: ## remove what was built (not .venv, not the model cache)
	rm -rf _docs build dist *.egg-info .pytest_cache .ruff_cache
