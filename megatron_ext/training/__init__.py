"""Training: state, one step, the loop."""
