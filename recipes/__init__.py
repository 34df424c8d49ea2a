"""What to run: functions that return graphs, and the values they are made of. No logic of its own."""
