"""Reinforcement learning: the objective, the length of responses, and the loop that reads as the algorithm."""
