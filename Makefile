# Everything starts from Python 3.11 and make:
#   make demo    set up, pre-train a small model with SSD, draw and print what happened (about 5 minutes, 2 cores)
#   make test    set up, run the tests
#   make lint    set up, run ruff and mypy
#   make gpu     set up, test and measure on this machine's GPU; writes benchmarks/results/DATE-GPU.json
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More flags for the demo's run, e.g. make demo ARGS="--data ../my-text"
ARGS ?=

.PHONY: demo test lint gpu setup clean
.DEFAULT_GOAL := demo

setup: $(READY)

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, not %d.%d: make PYTHON=/path/to/python3.11" % v)'
	@echo "setting up $(VENV) (once; a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	@$(BIN)/switchable pretrain configs/demo.yaml --out runs/demo --overwrite $(ARGS)

test: $(READY)
	@# Each process takes a row of neighbours, so that what they share is trained and compiled once.
	@$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

gpu: $(READY)
	@$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf runs build dist
