# The few verbs of this project. Needs Python >= 3.11 with venv, a C compiler with OpenMP, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard cconv/cpu/*.pyx cconv/cpu/*.pxd cconv/cpu/kernels/*)

.PHONY: run test test-all test-wheel test-sanitizers test-slow lint bench pictures up down clean

## run: start the service, send it a photograph, show maps and bill, serve until Ctrl-C (PORT=8080, ONCE=1 to stop)
run: $(VENV)/.demo
	@PORT=$(PORT) ONCE=$(ONCE) $(BIN)/python examples/run_demo.py

## test: the suite (pip packages only)
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

## test-all: what is slow or needs more than pip packages
test-all: test-wheel test-sanitizers test-slow

test-wheel: $(VENV)/.dev
	PYTHON=$(BIN)/python sh tests/wheel.sh

test-sanitizers: $(VENV)/.dev
	PYTHON=$(BIN)/python sh tests/sanitizers.sh

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

## lint: style of Python
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## bench: cconv against PyTorch in one interleaved run, in an environment of its own
bench: $(VENV)/.dev .venv-bench/.ready
	$(BIN)/python benchmarks/compare.py --peer-python .venv-bench/bin/python

## pictures: draw the pictures of the documentation again
pictures: $(VENV)/.dev
	$(BIN)/python docs/make_pictures.py

## up, down: the deployed service
up:
	docker compose up --build --detach

down:
	docker compose down

clean:
	rm -rf build dist out *.egg-info $(VENV) .venv-bench cconv/cpu/_*.c cconv/cpu/*.so

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cconv needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.demo

# PyTorch exactly 2.13.0: its plain package is a CPU build.
.venv-bench/.ready:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check 'torch==2.13.0' 'numpy>=2,<3'
	@touch $@
