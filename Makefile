# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON := $(shell for p in python3.12 python3.13 python3.11; do $$p -c '' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := .venv/bin/python -m pytest -n auto -rs

.PHONY: demo setup setup-interop test test-slow test-interop lint format lock

setup: .venv/installed
setup-interop: .venv/installed-interop

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer (3.12 is faster)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@

.venv/installed-interop: .venv/installed
	$(PIP) -e '.[dev,interop]'
	@touch $@

demo: .venv/installed  ## fine-tunes the bundled weights on generated ultrasound, in about two minutes
	.venv/bin/python scripts/demo.py

test: .venv/installed  ## core tests
	$(PYTEST) -m 'not interop and not slow'

test-slow: .venv/installed  ## tests that take minutes: meshes and processes, a run killed at twenty random moments
	$(PYTEST) --dist loadfile -m 'slow and not interop'

test-interop: .venv/installed-interop  ## parity with torch, transformers, peft and timm
	$(PYTEST) -m interop

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock:  ## resolves constraints.txt anew for Python 3.12 and 3.11
	python3.12 scripts/lock.py python3.12 python3.11 > constraints.new
	mv constraints.new constraints.txt
