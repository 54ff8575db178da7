# The few verbs of this project. Needs Python >= 3.11 with venv, a C compiler with OpenMP, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MARKDOWN ?= out/benchmarks.md
SOURCES := setup.py pyproject.toml $(wildcard cconv/cpu/*.pyx cconv/cpu/*.pxd cconv/cpu/kernels/*)

.PHONY: run env test test-all test-postgresql test-wheel test-sanitizers test-slow test-spills test-cuda lint bench bench-networks soak pictures up down clean

## run: start the service, send it a photograph, show maps and bill, serve until Ctrl-C (PORT=8080, ONCE=1 to stop)
run: $(VENV)/.demo
	@PORT=$(PORT) ONCE=$(ONCE) $(BIN)/python examples/run_demo.py

## test: the suite (pip packages only): a process per core, then what needs the machine to itself
test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n auto -m "not slow and not alone and not postgresql and not gpu" --durations=10
	$(BIN)/python -m pytest -q -m "not slow and alone and not postgresql and not gpu" --durations=10

## test-all: what is slow or needs more than pip packages (POSTGRESQL=--need-postgresql fails without it)
test-all: test-spills test-postgresql test-wheel test-sanitizers test-slow test-cuda

test-postgresql: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "postgresql and not slow" $(POSTGRESQL) tests/ledger tests/http

test-wheel: $(VENV)/.dev
	PYTHON=$(BIN)/python sh tests/wheel.sh

test-sanitizers: $(VENV)/.dev
	PYTHON=$(BIN)/python sh tests/sanitizers.sh

test-spills: $(VENV)/.dev
	$(BIN)/python tests/spills.py

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m "slow and not gpu" $(POSTGRESQL)

# Every GPU kernel for every architecture, by a compiler from PyPI; and CuPy's import, without a GPU.
test-cuda: $(VENV)/.dev .venv-cuda/.ready
	PYTHONPATH=. .venv-cuda/bin/python -m pytest -q -n auto --dist worksteal --need-compilers \
		tests/gpu/test_compile.py tests/gpu/test_door.py tests/backends/test_twins.py

## lint: style of Python
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## bench: cconv against its peers in one interleaved run, in an environment of its own: 25 minutes, or OPTIONS=--quick
bench: $(VENV)/.dev .venv-bench/.ready
	$(BIN)/python benchmarks/compare.py --peer-python .venv-bench/bin/python --markdown $(MARKDOWN) $(OPTIONS)

## bench-networks: whole networks against ONNX Runtime and OpenVINO, in the same environment: 3 minutes
bench-networks: $(VENV)/.dev .venv-bench/.ready
	$(BIN)/python benchmarks/networks.py --peer-python .venv-bench/bin/python --markdown $(MARKDOWN) $(OPTIONS)

## soak: 10,000 mixed requests to one server: its memory, and its ledger against what clients were told; two minutes
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/soak.py $(OPTIONS)

## pictures: draw the pictures of the documentation again
pictures: $(VENV)/.dev
	$(BIN)/python docs/make_pictures.py

## up, down: the deployed service; its passwords and first API keys are made once, into .env, which its owner alone reads
up: env
	docker compose up --build --detach
	@echo "The service is on http://127.0.0.1:$${PORT:-8080}; your API key is CCONV_API_KEY in .env"

# What is there already stays. An API key is its id, which may be seen, and its secret.
env:
	@umask 077; hex() { head -c 64 /dev/urandom | od -A n -t x1 | tr -d ' \n' | cut -c "1-$$1"; }; \
	once() { grep -qs "^$$1=" .env || echo "$$1=$$2" >> .env; }; \
	once CCONV_DB_PASSWORD "$$(hex 48)"; once GRAFANA_PASSWORD "$$(hex 32)"; \
	for name in CCONV_API_KEY CCONV_METRICS_KEY; do once $$name "cck_$$(hex 12)_$$(hex 43)"; done

down:
	docker compose down

clean:
	rm -rf build dist out *.egg-info $(VENV) .venv-bench .venv-cuda cconv/cpu/_*.c cconv/cpu/*.so

# What the extra `gpu` names, and not cconv itself: that is compiled already, and found by PYTHONPATH.
.venv-cuda/.ready: pyproject.toml
	$(BIN)/python -m venv .venv-cuda
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu"], \
		*["numpy", "pytest>=8.4,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.130,<7"], sep="\n")' > .venv-cuda/requirements.txt
	.venv-cuda/bin/python -m pip install --disable-pip-version-check -r .venv-cuda/requirements.txt
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "cconv needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo]'
	@touch $@

# cconv is there already, so that only what the extra names is installed and nothing is compiled again.
$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --disable-pip-version-check 'cconv[dev]'
	@touch $@

.venv-bench/.ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@
