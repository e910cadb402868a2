# Every command sets up .venv by itself; nothing needs to be installed first but Python 3.11 and make.
#
#   make generate PROMPT="a corgi in a party hat"
#   make help

# The Python that makes .venv: python3.11 where there is one that runs, else python3.
PYTHON ?= $(shell python3.11 -c "" >/dev/null 2>&1 && echo python3.11 || echo python3)

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.installed-lint
EMOJI := data/emoji

# OpenMP threads that spin while they wait slow everything else down (and each other).
export OMP_WAIT_POLICY ?= PASSIVE

# What a person types reaches the recipes through the environment, untouched: quotes, dollars, spaces.
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
override MODEL := $(value MODEL)
override GUIDES := $(value GUIDES)
export PROMPT OUT MODEL GUIDES SEED NUM STEPS GUIDANCE SIZE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help generate app train bench test test-slow test-browser lint format setup clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

generate: $(INSTALLED)  ## draw PROMPT="..."; also OUT=folder, SEED, NUM, STEPS, GUIDANCE, SIZE, MODEL=folder, GUIDES=folder
	@test -n "$$PROMPT" || { echo 'Say what to draw: make generate PROMPT="a red heart"' >&2; exit 2; }
	@$(RUN) -m pipelines \
	  $${OUT:+--out "$$OUT"} $${SEED:+--seed "$$SEED"} $${NUM:+--num-images-per-prompt "$$NUM"} $${STEPS:+--num-inference-steps "$$STEPS"} \
	  $${GUIDANCE:+--guidance-scale "$$GUIDANCE"} $${SIZE:+--size "$$SIZE"} $${MODEL:+--model "$$MODEL"} $${GUIDES:+--guides "$$GUIDES"} -- "$$PROMPT"

app: $(INSTALLED)  ## the web page, at the address it prints; MODEL, GRADIO_SERVER_NAME, GRADIO_SERVER_PORT
	@$${MODEL:+env CORGI_MODEL="$$MODEL"} $(RUN) app.py

train: $(INSTALLED) | $(EMOJI)  ## train text to image on the emoji set; ARGS="--max_train_steps 100 ..."
	$(VENV)/bin/accelerate launch --quiet -m training.text_to_image --config training/configs/emoji.yaml $(ARGS)

bench: $(INSTALLED)  ## timings against other implementations
	$(RUN) -m benchmarks.speed $(ARGS)

test: $(INSTALLED)  ## the tests that need nothing else, in two processes; ARGS="-k scheduler"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not browser and not npm and not metrics" $(ARGS)

test-slow: $(INSTALLED)  ## the longer tests
	$(RUN) -m pytest -m "slow and not browser and not npm and not metrics" $(ARGS)

test-browser: $(INSTALLED)  ## the web page in a real Chromium
	$(RUN) -m pip install --quiet --requirement tests/requirements-browser.txt
	$(RUN) -m pytest -m browser $(ARGS)

lint: $(LINT_INSTALLED)  ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(LINT_INSTALLED)  ## put the code in ruff's format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

setup: $(INSTALLED)  ## only set up .venv

clean:  ## remove .venv and caches; models, data and outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# The stamp is written last: an installation that failed is tried again.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV); the first time takes some minutes." >&2
	@$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(LINT_INSTALLED): tests/requirements-lint.txt $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement tests/requirements-lint.txt
	@touch $@

$(EMOJI): | $(INSTALLED)
	$(RUN) -m training.emoji --output_dir $(EMOJI)
