"""Checkpoints in Megatron's torch_dist layout: written aside, published whole, opened without running code."""
