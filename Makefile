# `make run` and `make test` do everything on a fresh machine: they create .venv and install into it first.
PYTHON ?= python3
# On Linux the package index's plain torch is a CUDA build of several gigabytes. To take a CPU build instead, point
# pip at one: make run TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Modules are compiled, and kept so, when they are first imported; most of what is installed never is.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install -q --no-compile

.PHONY: run test test-all lint install install-dev clean

run: install
	$(BIN)/abyssal train small --resume
	$(BIN)/abyssal generate runs/small --prompt "def " --max-tokens 200 --temperature 0
	@echo "picture: runs/small/curves.png"

test: install-dev lint
	$(BIN)/pytest -q -n 2 --durations=8

test-all: install-dev lint
	$(BIN)/pytest -q -n 2 --durations=8
	$(BIN)/pytest -q -m slow --durations=8

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed
install-dev: .venv/installed-dev

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) $(TORCH)
	$(INSTALL) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
