PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/kvsieve compare --demo --output-dir ./comparison_results

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check src tests training benchmarks
	$(BIN)/ruff format --check src tests training benchmarks
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@echo "Creating $(VENV) and installing kvsieve (a few minutes on a fresh machine) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[dev,plot]"
	@touch $@

clean:
	rm -rf $(VENV) comparison_results
