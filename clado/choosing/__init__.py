"""From matrices to assignments: constraints, the program, solvers, proposals, local search."""
