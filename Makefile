# The vocabulary of the project; hooks and CI only call it. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: help up down status logs test unit lint audit format story compose-env story-compose bench bench-data bench-training bench-inference bench-explanation bench-faults lock browser

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

up: .venv/run ## start the whole platform here; ends when a model serves
	@$(BIN)/python -m neuroloop.cli up

down: .venv/run ## stop every process of it; the state stays in .neuroloop
	@$(BIN)/python -m neuroloop.cli down

status: .venv/run ## each part and its state
	@$(BIN)/python -m neuroloop.cli status

logs: .venv/run ## the latest log lines of every part
	@$(BIN)/python -m neuroloop.cli logs

test: .venv/dev browser ## all tests: unit, browser, and the story of the whole loop
	@$(BIN)/python -m pytest

unit: .venv/dev ## the quick tests only
	@$(BIN)/python -m pytest -m "not e2e"

lint: .venv/dev ## ruff, mypy, import-linter, a search for secrets; warnings are errors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@git ls-files -z | xargs -0 -n 80 -P 2 $(BIN)/detect-secrets-hook --baseline .secrets.baseline

audit: .venv/dev ## known holes in the pinned packages; asks the vulnerability service of PyPI
	@$(BIN)/pip-audit --requirement requirements.txt --no-deps --disable-pip --progress-spinner off --strict

format: .venv/dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

story: .venv/dev ## play the whole loop on a stack of its own and print what happened as JSON
	@$(BIN)/python tests/e2e/story.py

compose-env: ## once: passwords for docker-compose.yaml, in .env
	@deploy/make-env

story-compose: .venv/dev ## the loop on docker-compose, one of two workers killed in mid-training; builds the images
	@$(BIN)/python tests/e2e/story_compose.py

bench: bench-data bench-training bench-inference bench-explanation bench-faults ## measure all of it, as ratios in one run each; JSON in bench/results

bench-data: .venv/dev ## the audit: what it finds, and its time and memory against the number of images
	@$(BIN)/python bench/data.py

bench-training: .venv/dev ## the input pipeline and the training step; scores on real scans: bench/training.py --scores
	@$(BIN)/python bench/training.py

bench-inference: .venv/dev ## one image, from bytes to heat map
	@$(BIN)/python bench/inference.py

bench-explanation: .venv/dev ## do heat maps point at the lesions of simulated scans; trains for some minutes
	@$(BIN)/python bench/explanation.py

bench-faults: .venv/dev ## 2,000 known answers, the API killed 100 times, PostgreSQL 50 times; some 20 minutes
	@$(BIN)/python bench/serving_faults.py

lock: .venv/dev ## pin the newest versions that fit pyproject.toml
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 pyproject.toml -o requirements.txt --upgrade
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --extra dev -c requirements.txt pyproject.toml -o requirements-dev.txt
	@for image in api ui mlflow; do $(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
	  --group $$image -c requirements.txt -o deploy/requirements-$$image.txt --upgrade; done

# Chromium for the browser tests, where the machine has none.
browser:
	@command -v chromium >/dev/null || { \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  echo "installing chromium for the browser tests"; \
	  $$as_root apt-get -qq update && DEBIAN_FRONTEND=noninteractive $$as_root apt-get -qq install -y --no-install-recommends chromium >/dev/null; }

.venv/bin/uv:
	@command -v $(PYTHON) >/dev/null || { echo "NeuroLoop needs Python 3.11 ($(PYTHON) is not on the PATH); set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip --quiet --disable-pip-version-check install uv==0.13.8

.venv/run: requirements.txt | .venv/bin/uv
	@echo "installing requirements.txt into .venv"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "installing requirements-dev.txt into .venv"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt
	@touch $@
