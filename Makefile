# Two commands do everything on a fresh machine: `make serve` and `make test`. `make help` lists the rest.
#
# PYTHON          which interpreter makes .venv (3.11 or newer)
# TORCH_PIP_ARGS  extra pip arguments for torch alone, for example the index of its CPU wheels. The version stays the
#                 one in constraints.txt. Plain `pip` may fetch a build with CUDA: larger, and it runs on a CPU as well.
# CONSTRAINTS     empty installs the newest versions instead of the pinned ones (GPU machines, see constraints.txt)
# EXTRAS          optional parts of the project to install
# ARGS            extra arguments for serve, bench, bench-peers, eval; PYTEST_ARGS for test and load
# PEERS           folder that `make bench-peers` installs other servers into
# LOAD_SECONDS    how long the clients of `make load` ask

PYTHON ?= python3
TORCH_PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev,docs,eval,otel,quantize
ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
LOAD_SECONDS ?= 120
PEERS ?= benchmarks/.peers
GPU_SECTIONS ?= env,ceilings,warm-up,pick,features

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIN := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# One torch thread per test process: the models are tiny, and several threads only fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install tools serve test lint format typecheck pytest load docs docs-serve bench bench-gpu bench-peers eval \
  clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the proxyserve command in it

# torch goes first and alone: packages that depend on it would otherwise choose its version and build. What is imported
# is compiled then; compiling all of it here takes a minute and more.
$(STAMP): pyproject.toml clients/python/pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "proxyserve needs Python 3.11 or newer: make install PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(PIN) $(TORCH_PIP_ARGS) torch
	$(BIN)/python -m pip install --quiet --no-compile $(PIN) --editable '.[$(EXTRAS)]' --editable clients/python
	@touch $@

serve: install ## serve the demo family at 127.0.0.1:8000
	$(BIN)/proxyserve demo --host 127.0.0.1 --port 8000 $(ARGS)

test: install tools lint typecheck pytest ## install, lint, check types, run every test

tools: ## a browser, nginx and Prometheus for the tests that need them (Debian, as root; elsewhere it says what is missing)
	@tests/install_tools.sh

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install ## mypy over the server, the kernels, the Python client and the benchmarks
	$(BIN)/mypy --num-workers 2

pytest: install
	$(TEST_ENV) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

load: install ## two minutes of 200 clients that stream, leave and abort at random, and what it did to the server
	PROXYSERVE_LOAD_SECONDS=$(LOAD_SECONDS) $(TEST_ENV) $(BIN)/python -m pytest -s tests/api/test_load.py $(PYTEST_ARGS)

docs: install ## the documentation site, into site/; any warning is an error
	$(BIN)/zensical build --strict --clean

docs-serve: install ## the site at 127.0.0.1:8001, built again at every change
	$(BIN)/zensical serve --dev-addr 127.0.0.1:8001

bench: install ## proxyserve beside the plain Hugging Face loop; what solving, swaps and many experts cost
	$(BIN)/proxyserve bench $(ARGS)

# Needs nothing but torch, triton and transformers, so it uses any Python that has them, and under eight minutes. On a
# machine without a GPU it only shows that it runs: figures mean nothing there.
bench-gpu: ## kernels and decoding on a GPU beside what their bytes must cost (PYTHON has torch; OUT: a folder for JSON)
	PYTHONPATH=.:kernels $(PYTHON) -m proxyserve_kernels.bench --only $(GPU_SECTIONS)
	PYTHONPATH=.:kernels $(PYTHON) -m proxyserve.bench.gpu

bench-peers: install ## proxyserve beside vLLM, llama.cpp and transformers serve, which it installs (PEERS: where)
	PYTHON=$(PYTHON) TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" benchmarks/setup_peers.sh $(PEERS) || true
	$(BIN)/python -m benchmarks.peers --peers $(PEERS) $(ARGS)

eval: install ## the gap-closed table of the demo family
	$(BIN)/proxyserve eval $(ARGS)

clean: ## remove .venv and everything that tools left behind
	rm -rf $(VENV) build dist *.egg-info clients/python/build clients/python/*.egg-info
	rm -rf site .cache
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find proxyserve kernels clients benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
