# Everything a developer types. `make` alone lists it. Nothing here needs root but `make test-deps`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

BIN := .venvs/core/bin
# `make run ARGS="--size small --fresh"`, `make test ARGS="tests/unit/dicom -x"`
ARGS ?=
# Tests at once; a file's tests stay together, in the order of the folders: the long ones come first, and nobody waits for them.
JOBS ?= 2
# `make airflow`: the project's folder, and the port on which Airflow answers.
PROJECT ?= .
PORT ?= 8081
# Debian packages that tests start; radloop itself needs none of them (but openssh-client, where approvals are signed).
TEST_PACKAGES := chromium dcmtk dicom3tools openssh-client openssl orthanc orthanc-dicomweb postgresql

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: setup ## set up, then the whole loop on a simulated hospital (ARGS: options of `radloop demo`)
	@$(BIN)/radloop demo --yes $(ARGS)

.PHONY: setup
setup: ## make the environments that locks/ describes (PYTHON= names a Python 3.11)
	@PYTHON="$(PYTHON)" scripts/setup core tfdv

.PHONY: test
test: setup ## run the tests (ARGS: options of pytest)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-cluster
test-cluster: setup ## run the Kubernetes engine's tests on a cluster of this machine (root; RADLOOP_TEST_CLUSTER names what makes one)
	@scripts/test-cluster $(ARGS)

.PHONY: airflow
airflow: setup ## the loop of a project on Airflow, with its listener and predictors (PROJECT: its folder, PORT: Airflow's)
	@PYTHON="$(PYTHON)" scripts/setup airflow
	@.venvs/airflow/bin/python -m radloop_airflow.standalone --project "$(PROJECT)" --port $(PORT) --core "$(CURDIR)/$(BIN)/python"

.PHONY: test-airflow
test-airflow: setup ## run the tests of the Airflow engine, in the Airflow environment
	@PYTHON="$(PYTHON)" scripts/setup airflow
	@.venvs/airflow/bin/python -m pytest tests/airflow $(ARGS)

.PHONY: torture
torture: setup ## run the long tests too: kills at many seeded moments
	@RADLOOP_TORTURE=1 $(BIN)/python -m pytest -m torture --timeout 3600 $(ARGS)

.PHONY: bench
bench: setup ## measure what we promise about speed, and our peers in the same run
	@PYTHON="$(PYTHON)" scripts/setup airflow bench
	@$(BIN)/python benchmarks/engines.py

.PHONY: bench-dicom
bench-dicom: setup ## measure receiving, fetching and de-identifying, beside Orthanc, dcmtk and the de-identifiers on PyPI
	@PYTHON="$(PYTHON)" scripts/setup bench
	@for one in dicom_store dicom_stow dicom_pacs dicom; do $(BIN)/python benchmarks/$$one.py || true; done

.PHONY: bench-serving
bench-serving: setup ## measure what serving adds to a model's own time, beside peers, and how often the judge errs
	@scripts/setup bench
	@$(BIN)/python benchmarks/serving.py $(ARGS) || true
	@$(BIN)/python benchmarks/judge.py

.PHONY: lint
lint: setup ## style, imports between the rooms, declared dependencies
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@cd packages/radloop && ../../$(BIN)/deptry src
	@cd packages/radloop-tfdv && ../../$(BIN)/deptry src
	@cd packages/radloop-airflow && ../../$(BIN)/deptry src

.PHONY: format
format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: types
types: setup ## mypy --strict
	@$(BIN)/mypy
	@PYTHON="$(PYTHON)" scripts/setup airflow
	@$(BIN)/mypy --python-executable .venvs/airflow/bin/python packages/radloop-airflow/src

.PHONY: docs
docs: setup ## generate what docs/ takes from the code: JSON schemas and the command line's help
	@$(BIN)/python scripts/generate_docs.py

.PHONY: lock
lock: ## compile the locks again (ARGS="--upgrade" takes the newest versions)
	@PYTHON="$(PYTHON)" scripts/setup uv
	@scripts/lock $(ARGS)

.PHONY: test-deps
test-deps: ## install the Debian packages that tests start (root or sudo; else the command is printed)
	@scripts/test-deps $(TEST_PACKAGES)

.PHONY: clean
clean: ## remove environments, caches and what the demo wrote
	@rm -rf .venvs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build radloop-demo
	@find packages tests -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
