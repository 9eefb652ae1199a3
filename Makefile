# The vocabulary of the project; hooks and CI only call it. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: kills help up down status logs test unit lint audit format story bench bench-data bench-training bench-inference bench-explanation bench-gate bench-faults bench-scale lock browser emulators validate images push registry-login bump publish-bump bench-serving compose-env story-compose

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

test: .venv/dev browser emulators ## all tests: unit, browser, and the story of the whole loop
	@$(BIN)/python -m pytest

unit: .venv/dev emulators ## the quick tests only
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

bench: bench-data bench-training bench-inference bench-explanation bench-gate bench-faults bench-serving bench-scale ## measure all of it, as ratios in one run each; JSON in bench/results

bench-data: .venv/dev ## the audit: what it finds, and its time and memory against the number of images
	@$(BIN)/python bench/data.py

bench-scale: .venv/dev ## work on images: its cost against their number, and what a second worker gains
	@$(BIN)/python bench/scale.py

bench-training: .venv/dev ## the input pipeline and the training step; scores on real scans: bench/training.py --scores
	@$(BIN)/python bench/training.py

bench-inference: .venv/dev ## one image, from bytes to heat map
	@$(BIN)/python bench/inference.py

bench-explanation: .venv/dev ## do heat maps point at the lesions of simulated scans; trains for some minutes
	@$(BIN)/python bench/explanation.py

kills: .venv/dev ## each task of both DAGs killed and tried again, to the end; the quick ones are among the tests
	@$(BIN)/python -m pytest -m e2e tests/loop/test_killed_tasks.py

bench-gate: .venv/dev ## how often the input gate errs, kind by kind; trains for some minutes
	@$(BIN)/python bench/gate.py

bench-faults: .venv/dev ## 2,000 known answers, the API killed 100 times, PostgreSQL 50 times; some 20 minutes
	@$(BIN)/python bench/serving_faults.py

bench-serving: .venv/dev ## the API under load on one core, against mlflow models serve and FastAPI + Keras; some 5 minutes
	@$(BIN)/python bench/serving.py

lock: .venv/dev ## pin the newest versions that fit pyproject.toml
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 pyproject.toml -o requirements.txt --upgrade
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --extra dev -c requirements.txt pyproject.toml -o requirements-dev.txt
	@for image in api ui mlflow; do $(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
	  --group $$image -c requirements.txt -o deploy/requirements-$$image.txt --upgrade; done

validate: .venv/dev ## manifests, Terraform and workflows, as far as this machine has the tools
	@$(BIN)/python -m pytest tests/deploy

# --- Images and deployments. TAG=1.2.3 or v1.2.3; REGISTRY=host/path, empty: this machine's own images.
# EXTRA_PACKAGES='boto3 dvc-s3' for a store on s3://, 'tensorflow[and-cuda]>=2.19' for training on GPUs.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/neuroloop/__init__.py)
REGISTRY ?=
ENVIRONMENT ?=
TAG ?= $(VERSION)
override TAG := $(TAG:v%=%)
# image:target of deploy/Dockerfile
IMAGES := airflow:airflow api:api frontend:ui mlflow:mlflow
BUILD = docker buildx build --file deploy/Dockerfile --target "$${image\#*:}" \
	$(if $(EXTRA_PACKAGES),--build-arg EXTRA_PACKAGES="$(EXTRA_PACKAGES)") \
	--label "org.opencontainers.image.version=$(TAG)" --label "org.opencontainers.image.revision=$$(git rev-parse HEAD)" \
	--tag "$(REGISTRY:%=%/)neuroloop-$${image%:*}:$(TAG)"

images: ## build the four images here, in the version of the sources or TAG=...
	@for image in $(IMAGES); do $(BUILD) --load .; done

registry-login: ## log docker in to REGISTRY as REGISTRY_USER, with REGISTRY_PASSWORD from the environment
	@docker login --username "$$REGISTRY_USER" --password-stdin "$$(cut -d / -f 1 <<< "$(REGISTRY)")" <<< "$$REGISTRY_PASSWORD"

push: ## build and push the images to REGISTRY with provenance and SBOM
	@[ -n "$(REGISTRY)" ] || { echo "name the registry: make push REGISTRY=host/path TAG=1.2.3"; exit 1; }
	@for image in $(IMAGES); do $(BUILD) --provenance=mode=max --sbom=true --push .; done

bump: ## move an environment's overlay to other images: ENVIRONMENT=gke TAG=1.2.3
	@python3 deploy/bump "$(ENVIRONMENT)" "$(TAG)"

publish-bump: bump ## commit and push that; Argo CD follows
	@git add deploy/kubernetes/overlays
	@git diff --cached --quiet || git -c user.name=neuroloop-deploy -c user.email=deploy@example.org \
	  commit --quiet --message "$(ENVIRONMENT) runs $(TAG)"
	@git push --quiet origin HEAD:main

# Chromium for the browser tests, where the machine has none.
browser:
	@command -v chromium >/dev/null || { \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  echo "installing chromium for the browser tests"; \
	  $$as_root apt-get -qq update && DEBIAN_FRONTEND=noninteractive $$as_root apt-get -qq install -y --no-install-recommends chromium >/dev/null; }

# S3 (moto) and Azure Blob (Azurite) for the tests of the stores, and what speaks to AWS in the extra `aws`: in an
# environment of their own, since they want an older python-dateutil. Without npm there is no Azurite, and tests skip.
emulators: .cache/emulators/python/done .cache/emulators/node_modules

.cache/emulators/python/done: pyproject.toml | .venv/bin/uv
	@echo "installing moto and the extra aws into .cache/emulators"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .cache/emulators/python
	@grep -v '^python-dateutil=' requirements.txt >.cache/emulators/constraints.txt
	@$(BIN)/uv pip install --quiet --python .cache/emulators/python -c .cache/emulators/constraints.txt 'moto[server]>=5.1' 'boto3>=1.40' 'dvc-s3>=3'
	@touch $@

.cache/emulators/node_modules:
	@if command -v npm >/dev/null; then \
	  echo "installing azurite into .cache/emulators"; \
	  mkdir -p .cache/emulators && npm install --silent --no-audit --no-fund --prefix .cache/emulators azurite@3; \
	else echo "npm is not here: the tests against Azure Blob will skip"; fi

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
