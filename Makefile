PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := 5.14.0

.PHONY: demo test test-oldest bench lint clean

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

# Every target of the engine, beside the peer in an environment of its own. Writes benchmarks/RESULTS.md.
bench: $(STAMP) $(VENV)-peer/.installed
	$(BIN)/python benchmarks/engine.py --peer $(VENV)-peer

# Without it the benchmark still runs, and says what it could not compare.
$(VENV)-peer/.installed: benchmarks/engine/make_peer_env.sh constraints.txt
	-PYTHON=$(PYTHON) sh benchmarks/engine/make_peer_env.sh $(VENV)-peer

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
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-peer comparison_results ruler_results longbench_results visualize_results
