"""Models: a `ModelConfig` as Megatron-Core's GPTModel, and its weights."""
