"""What is measured: the plan in integers, the kinds of tiles, and the sweep that executes them."""
