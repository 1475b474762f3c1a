"""The Python interface: one process, no orchestrator. `import clado` has its names."""
