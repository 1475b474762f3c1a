"""Orchestration: Prefect flows, Dask workers, clusters and the command line. Verbs only; what they do is in `clado`."""
