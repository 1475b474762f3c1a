"""What is measured: the plan in integers, and the sweep that executes it."""
