# make test        format, lint, types, tests
# make test-fast   the tests that take seconds
# make demo        text -> tokenizer -> corpus -> base -> stable -> three decays -> report, in runs/demo
# make demo-clean  forget runs/demo
#
# Packages come from wherever pip's own settings say (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, ...).

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
LOCK := tools/locks/cpu-py311.txt
STAMP := .venv/.installed
RUN := .venv/bin

.PHONY: .venv lint test test-fast demo demo-clean

.venv: $(STAMP)

$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet -c $(LOCK) -e ".[dev]"
	touch $@

lint: .venv
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy megatron_ext recipes

test: lint
	$(RUN)/pytest

test-fast: .venv
	$(RUN)/pytest -m "not slow"

demo: .venv
	$(RUN)/megatron-ext launch demo:demo --local

demo-clean:
	rm -rf runs/demo
