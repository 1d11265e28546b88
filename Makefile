PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := 5.14.0

.PHONY: demo test test-oldest lint clean

demo: $(STAMP)
	$(BIN)/kvsieve compare --demo --output-dir ./comparison_results

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# The oldest transformers that kvsieve supports, in an environment of its own.
test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -n 2 tests/core tests/hf tests/text tests/dialogue tests/tasks tests/test_trace.py

$(VENV)-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	grep -v '^transformers' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --progress-bar on -c $(VENV)-oldest/constraints.txt -e ".[dev,plot]" "transformers==$(OLDEST)"
	@touch $@

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
	rm -rf $(VENV) $(VENV)-oldest comparison_results
