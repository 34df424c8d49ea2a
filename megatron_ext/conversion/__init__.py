"""Between Hugging Face folders and Megatron checkpoints: exact in both directions, tensor by tensor, without a model in memory."""
