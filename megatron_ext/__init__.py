"""megatron_ext: stable-then-decay mid-training, its branches and their RL, on Megatron-Core."""

__version__ = "0.1.0"
