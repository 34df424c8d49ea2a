"""What a checkpoint can do: estimators with their intervals, and the runs that feed them."""
