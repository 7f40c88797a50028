# Commands everybody uses. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON  ?= python3.11
VENV    := .venv
PY      := $(VENV)/bin/python
CLUSTER ?= local
export CLUSTER
export PYTHONSAFEPATH :=
export PYTHONDONTWRITEBYTECODE := 1

SOURCES := operator runtime mizzen/cli hack benchmarks tests

.PHONY: help
help:  ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

# --- first look ------------------------------------------------------------------------------

.PHONY: demo
demo:  ## From a fresh machine to a chat answer through a real cluster, and on to a fine-tuned adapter
	@$(PYTHON) -m hack.demo

.PHONY: test
test: venv  ## Everything that must pass before a change lands
	@$(PY) -m hack.models fetch
	@$(MAKE) --no-print-directory bin
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target beside-e2e e2e

# The full cluster's tests wait for pods half of their time; these fill the gaps and yield to them.
.PHONY: beside-e2e
beside-e2e: venv bin
	@nice -n 5 $(MAKE) --no-print-directory --jobs 1 unit
	@nice -n 5 $(MAKE) --no-print-directory --jobs 1 api

# --- development -----------------------------------------------------------------------------

KERNELS := $(wildcard runtime/kernels/*.c runtime/kernels/*.h) runtime/kernels/compile.py

$(VENV)/.synced: requirements.lock pyproject.toml hatch_build.py $(KERNELS)
	@echo "== Python environment in $(VENV) (torch is large: about two minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@test -x $(VENV)/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip sync --quiet --python $(PY) requirements.lock
	@$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	@touch $@

.PHONY: venv
venv: $(VENV)/.synced  ## Install the pinned Python environment into .venv

.PHONY: lock
lock: venv  ## Pin every dependency again, by name and hash
	@$(VENV)/bin/uv pip compile pyproject.toml --all-extras --generate-hashes --no-emit-index-url \
		--no-annotate --quiet --upgrade --output-file requirements.lock

.PHONY: lint
lint: venv  ## Style, types, import contracts, generated files, links
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/ruff format --check $(SOURCES)
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/codespell README.md CONTRIBUTING.md docs operator runtime mizzen/cli hack manifests --skip '*.lock,*.sum,*.json' --ignore-words-list notin
	@$(PY) -m hack.generate all --check
	@$(PY) -m hack.chart --check
	@$(PY) -m hack.links

.PHONY: format
format: venv  ## Format the code
	@$(VENV)/bin/ruff check --fix $(SOURCES)
	@$(VENV)/bin/ruff format $(SOURCES)

.PHONY: unit
unit: venv  ## Tests that need neither a cluster nor the network
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/unit tests/sim -q -n 3 --dist loadfile

.PHONY: api
api: venv bin  ## The operator and the gateway against a real API server with simulated nodes
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/api -q -n 3 --dist worksteal

.PHONY: e2e
e2e: venv bin  ## The quickstart as written, on the full local cluster
	@MAKEFLAGS= $(PY) -m pytest tests/e2e -q

.PHONY: kueue
kueue: venv bin  ## Jobs in the queues of a real Kueue; the first time it is built
	@$(PY) -m hack.kueue
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/kueue -v -s

.PHONY: crds
crds: venv  ## Generate the CRDs, their reference pages and the chart's copies
	@$(PY) -m hack.generate crds
	@$(PY) -m hack.generate docs
	@$(PY) -m hack.chart

.PHONY: openapi
openapi: venv  ## Generate the gateway's OpenAPI description from the runtime's
	@$(PY) -m hack.generate openapi

.PHONY: chart
chart: venv bin  ## Generate and lint the Helm chart
	@$(PY) -m hack.chart
	@eval "$$($(PYTHON) -m hack.cluster env)" && helm lint charts/mizzen

.PHONY: scale
scale: venv bin  ## 1,000 LLMDeployments on simulated nodes, beside their peers
	@$(PY) -m benchmarks.operator_scale

.PHONY: autoscaling
autoscaling: venv  ## Our autoscaler beside seven others on recorded traffic ($$MIZZEN_TRACES)
	@$(PY) -m benchmarks.autoscaler

# Each script starts what it measures; nothing else should compute meanwhile. About 50 minutes on two
# cores, of which ten go into building and compiling the peers the first time.
.PHONY: bench
bench: venv  ## The runtime's figures on a CPU, each beside its peer in the same run
	@$(PY) -m benchmarks.peers vllm
	@$(PY) -m benchmarks.peers llama-cpp
	@set -e; \
	smollm2=$$($(PY) -m hack.models to-safetensors); \
	gpt2=$$($(PY) -m benchmarks.random_models gpt2-124m); \
	run() { echo "== $$*"; $(PY) -m benchmarks.$$@; }; \
	run start_to_first_token $$smollm2; \
	run serving_http $$smollm2; \
	run serving_throughput $$smollm2 --peers vllm vllm-auto llama-cpp; \
	run serving_throughput $$smollm2 --quantization int8 --peers vllm llama-cpp; \
	run serving_throughput $$gpt2 --peers transformers transformers-batch --rounds 2; \
	run inter_token_latency $$smollm2; \
	run prefix_cache $$smollm2; \
	run memory $$smollm2; \
	run perplexity $$smollm2; \
	run decode_profile $$smollm2

# --- the local cluster -----------------------------------------------------------------------

.PHONY: bin
bin:  ## Build the Kubernetes binaries once, into the cache
	@$(PYTHON) -m hack.cluster build

.PHONY: cluster-up
cluster-up:  ## Start the local cluster (again)
	@$(PYTHON) -m hack.cluster up

.PHONY: cluster-down
cluster-down:  ## Stop it and leave nothing behind
	@$(PYTHON) -m hack.cluster down

.PHONY: cluster-status
cluster-status:  ## What runs of it
	@$(PYTHON) -m hack.cluster status

.PHONY: cluster-env
cluster-env:  ## Print shell exports: eval "$(make -s cluster-env)"
	@$(PYTHON) -m hack.cluster env

.PHONY: images
images:  ## Build both images and push them to the local registry
	@$(PYTHON) -m hack.cluster images

.PHONY: deploy
deploy:  ## Install or upgrade the chart in the current cluster
	@$(PYTHON) -m hack.demo deploy

.PHONY: model
model:  ## Put the small real model on the quickstart's volume
	@$(PYTHON) -m hack.demo model

.PHONY: dev
dev: venv  ## Run the working tree in the cluster: a changed file is live after a pod restart
	@$(PY) -m hack.dev
