# Two commands on a fresh machine: `make run` and `make test`. `make help` lists the others.
#
# The environment is made once, in .venv, from the ranges in pyproject.toml at the versions in requirements.lock.
# `make run PYTHON=path/to/python` uses an environment that exists and installs only what it lacks.

VENV ?= .venv
JOBS ?= 2
PROFILE ?= tiny
ARGS ?=

ifdef PYTHON
PY := $(PYTHON)
READY := build/ready$(subst /,-,$(PYTHON))
READY_TO_TEST := build/tests$(subst /,-,$(PYTHON))
READY_FOR_SITE := build/pages$(subst /,-,$(PYTHON))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test
READY_FOR_SITE := $(VENV)/.ready-for-site
endif

TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test test-slow traps chaos abuse lab bench models korean site format

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 17

run: $(READY) ## train and evaluate on the embedded world through the notebooks, and write the report
	$(PY) -m grpo_kit.cli run --profile $(PROFILE) $(ARGS)

test: $(READY_TO_TEST) ## run the tests, but for those marked slow
	$(TESTS) -m "not slow" $(ARGS)

test-slow: $(READY_TO_TEST) ## run the slow tests: real JupyterLab, notebooks, kills and crashes (ARGS="-m long": the longest)
	$(TESTS) -m "slow and not long" $(ARGS)

traps: $(READY_TO_TEST) ## show that each known trap of GRPO is avoided, and that deliberately broken versions are caught
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m trap --traps -n $(JOBS) --dist loadfile $(ARGS)

chaos: $(READY_TO_TEST) ## kill, crash, fill up and damage runs, and show that nothing is lost (ARGS="--short", or some: ARGS="R1 R2")
	OMP_NUM_THREADS=1 $(PY) -m tests.chaos $(ARGS)

abuse: $(READY_TO_TEST) ## try hostile names, values, texts and files, and show how often they were tried and got through
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m abuse --abuse -n $(JOBS) --dist loadfile $(ARGS)

lab: $(READY) ## open the notebooks in JupyterLab
	JUPYTER_DEFAULT_PROVISIONER_NAME=grpo-kit-forked $(PY) -m jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/index.ipynb $(ARGS)

bench: $(READY_TO_TEST) ## measure speed and memory, beside TRL (ARGS="--quick", or some workloads: ARGS="W1 W3")
	$(PY) -m benchmarks $(ARGS)

models: $(READY) ## train the embedded worlds' models again, from nothing
	$(PY) -m tools.shapeworld $(ARGS)
	@test -n "$(ARGS)" || { $(PY) -m tools.moving && $(PY) -m tools.tones; }

korean: $(READY_TO_TEST) ## bring the Korean edition up to date with the English (docs/locale/ko), build it and check it
	$(PY) -m tools.korean extract $(ARGS)
	$(PY) -m tools.korean build $(ARGS)
	$(PY) -m tools.korean check $(ARGS)

site: $(READY_FOR_SITE) ## build the site into build/site/html, which opens without a network (ARGS="--repository OWNER/NAME")
	$(PY) -m tools.site $(ARGS)

format: $(READY_TO_TEST) ## format the code, and strip the notebooks of what does not belong into history
	$(PY) -m ruff check --fix grpo_kit tools tests benchmarks
	$(PY) -m ruff format grpo_kit tools tests benchmarks
	find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -print0 | xargs -0 -r $(PY) -m nbstripout \
		--keep-output --keep-count --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets"

# What runs the notebooks comes first; what only tests, benchmarks and formatting need is added by the first of these.
$(VENV)/.ready: pyproject.toml requirements.lock
	@base=; for name in python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$$name; break; fi; done; \
	if [ -z "$$base" ]; then \
		echo "grpo_kit needs Python 3.11 or newer; found: $$(python3 --version 2>&1). Install one, or name it: make run PYTHON=..." >&2; \
		exit 2; fi; \
	$$base -m venv $(VENV)
	@echo "setting up $(VENV): 7 GB, 1 to 5 minutes, once" >&2
	@# uv installs the same versions faster; where it cannot be had, or fails, pip does it
	@$(PY) -m pip install --quiet --disable-pip-version-check uv || echo "uv cannot be had here; pip takes its place" >&2
	@$(call INSTALL,.)
	@touch $@

$(VENV)/.ready-to-test: $(VENV)/.ready
	@$(call INSTALL,.[dev])
	@touch $@

$(VENV)/.ready-for-site: $(VENV)/.ready
	@$(call INSTALL,.[site])
	@touch $@

define INSTALL
{ $(PY) -m uv --version >/dev/null 2>&1 && \
	$(PY) -m uv pip install --compile-bytecode --python $(PY) -c requirements.lock -e "$(1)"; } || \
	$(PY) -m pip install --disable-pip-version-check -c requirements.lock -e "$(1)"
endef

build/ready%: pyproject.toml
	@$(call INSTALL_INTO,.)

build/tests%: pyproject.toml
	@$(call INSTALL_INTO,.[dev])

build/pages%: pyproject.toml
	@$(call INSTALL_INTO,.[site])

define INSTALL_INTO
$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "grpo_kit needs Python 3.11 or newer; PYTHON=$(PY) is $$($(PY) --version 2>&1). Name another one." >&2; exit 2; }; \
	$(PY) -m pip install --quiet --disable-pip-version-check -e "$(1)" && mkdir -p $(@D) && touch $@
endef
