"""Orchestration: Prefect flows, Dask workers, clusters and the command line. The method itself is in `clado`."""
