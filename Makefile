# Every target makes the environment it needs when that is missing; Python 3.11-3.13, git and make are all that must be there before.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tools that look at locks, images and manifests are no part of the product.
TOOLS := .venv-tools
TOOLS_STAMP := $(TOOLS)/.installed
# Stage commands in dvc.yaml call `cae-pipe`, and DVC's own git calls need no pager.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env repro test soak lint serve bench bench-serving bench-training gpu-check gpu-wheels tools audit licenses images test-containers lint-containers lock lock-cpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

env: $(STAMP)  ## create .venv from requirements.lock

define new_venv
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found; install one or set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(STAMP): requirements.lock pyproject.toml
	$(call new_venv,$(VENV))
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

repro: $(STAMP)  ## run the pipeline (dvc repro) and print the results
	dvc repro
	@cae-pipe results

# Its processes share these file by file. What the others do would be disturbed: load, kills, real pages.
TOGETHER := tests/cae tests/pipeline tests/benchmarks/test_gpu_check.py

test: $(STAMP)  ## run the tests
	pytest -n logical --maxprocesses 4 --dist loadfile $(TOGETHER)
	pytest $(addprefix --ignore=,$(TOGETHER))

soak: $(STAMP)  ## run the hard tests in full: the server under attack, twenty kills of a training, compiling on two processes (some minutes; `make test` has a sample)
	CAE_SOAK=1 pytest tests/serving/soak tests/e2e/test_kills.py tests/cae/test_parallel.py -v -o log_cli=true -o log_cli_level=INFO

lint: $(STAMP)  ## ruff, mypy and the import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports

serve: $(STAMP)  ## serve the bundle that `make repro` made
	cae-pipe serve --bundle models/bundle

bench: bench-serving bench-training  ## every benchmark

bench-serving: $(STAMP)  ## our server, LitServe and the bare session in turn; ARGS="--rounds 2 --seconds 4"
	python -m benchmarks.serving $(ARGS)

bench-training: $(STAMP)  ## our training step, a plain one, BEiT and ViTMAE in turn; ARGS="--precision bf16 --out FILE.json"
	cae-pipe bench $(ARGS)

# Whoever lends a GPU may have torch and no cae-pipe: any Python that has torch will do, and nothing is installed.
gpu-check:  ## on a GPU: is it right, how fast is it (8 minutes); ARGS=--dry runs it tiny on a CPU, WHEELS=.wheels brings packages
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m benchmarks.gpu_check $(ARGS)

gpu-wheels: $(STAMP)  ## fill .wheels with what gpu-check needs beside torch, for CPython 3.12 on Linux x86-64
	rm -rf .wheels
	pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: --python-version 3.12 \
		--implementation cp $(addprefix --platform=,manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64) \
		-r benchmarks/gpu_check/wheels.lock -d .wheels
	@du -sh .wheels

images:  ## build the images cae-serving, cae-serving:cuda and cae-pipeline; ARGS="--build-arg BASE=..." goes to docker build
	docker build $(BUILD) -f docker/serving.Dockerfile -t cae-serving .
	docker build $(BUILD) -f docker/serving.Dockerfile --build-arg VARIANT=cuda -t cae-serving:cuda .
	docker build $(BUILD) -f docker/pipeline.Dockerfile -t cae-pipeline .

BUILD = --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) --build-arg REVISION=$(REVISION) $(ARGS)
REVISION = $$(git rev-parse HEAD)$$(git diff --quiet HEAD || echo -dirty)

lint-containers: $(TOOLS_STAMP)  ## hadolint, and the schemas of Compose and Kubernetes
	$(TOOLS)/bin/hadolint docker/*.Dockerfile
	@# The schema knows no `!reset` and no `!override`, which Compose itself takes away.
	set -e; for file in $(COMPOSE_FILES); do echo "$$file"; \
		sed -E 's/!(reset|override)//' $$file | $(TOOLS)/bin/check-jsonschema --builtin-schema vendor.compose-spec --default-filetype yaml -; done
	$(TOOLS)/bin/kubernetes-validate --strict docker/examples/kubernetes*.yaml

COMPOSE_FILES = compose*.yaml docker/examples/compose*.yaml

test-containers: $(STAMP) lint-containers  ## build the images and run them (some minutes, 20 GB); STRICT=1 fails where no engine can run
	CAE_CONTAINERS=$(if $(STRICT),strict,1) pytest tests/containers -v -o log_cli=true -o log_cli_level=INFO

tools: $(TOOLS_STAMP)  ## create .venv-tools from docker/tools.lock

$(TOOLS_STAMP): docker/tools.lock
	$(call new_venv,$(TOOLS))
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r docker/tools.lock
	@touch $@

audit: $(TOOLS_STAMP)  ## ask for known vulnerabilities of all that is locked; ARGS=--strict fails where no service answers
	$(TOOLS)/bin/python docker/audit.py $(ARGS)

licenses: $(TOOLS_STAMP)  ## renew docs/licenses.md from the locks of the images
	$(TOOLS)/bin/python docs/licenses.py

COMPILE = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate $(ARGS)

# The other locks take their versions from requirements.lock; what it does not name is theirs alone.
lock: $(TOOLS_STAMP)  ## renew the locks from pyproject.toml; ARGS="--upgrade-package NAME" renews a version
	$(COMPILE) pyproject.toml --all-extras -o requirements.lock
	$(COMPILE) -c requirements.lock pyproject.toml docker/serving-cpu.in --no-emit-package onnxruntime-gpu -o docker/serving-cpu.lock
	$(COMPILE) -c requirements.lock pyproject.toml docker/serving-cuda.in --no-emit-package onnxruntime -o docker/serving-cuda.lock
	$(COMPILE) -c requirements.lock pyproject.toml --extra pipeline --no-emit-package onnxruntime -o docker/pipeline-cuda.lock
	$(COMPILE) -c requirements.lock docker/tools.in -o docker/tools.lock
	$(COMPILE) -c docker/tools.lock docker/sbom.in -o docker/sbom.lock
	$(COMPILE) -c requirements.lock benchmarks/gpu_check/wheels.in --no-deps -o benchmarks/gpu_check/wheels.lock

lock-cpu: $(TOOLS_STAMP)  ## make docker/pipeline-cpu.lock: torch without CUDA, from PyTorch's index of CPU wheels (none is kept here)
	$(COMPILE) -c requirements.lock pyproject.toml docker/serving-cpu.in --extra pipeline --torch-backend cpu --no-emit-package onnxruntime-gpu -o docker/pipeline-cpu.lock

clean:  ## remove what the pipeline made, keep .venv, the DVC cache and your own images in data/
	rm -rf data/prepared data/downloads models/*/ metrics report scratch
