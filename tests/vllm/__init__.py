"""What needs vLLM, in an environment of its own: `make test-vllm`. `make test` does not collect this folder (pyproject.toml)."""
