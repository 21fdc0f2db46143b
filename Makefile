# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs. PYTHON is the interpreter that a missing .venv is made with.
# ARGS goes to pytest: make test ARGS="tests/ops -x".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-eval
	$(BIN)/vtprune eval eval/configs/quickstart.yaml

# A process a core, a thread a process.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One stamp for each set of extras, so that a changed dependency list is installed and an unchanged one is not.
$(VENV)/.installed-%: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
