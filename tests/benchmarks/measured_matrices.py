"""Measures the matrices of the zoo's networks that the solver's benchmark takes, as `clado run` does by default.

    python -m tests.benchmarks.measured_matrices      # about five minutes on one core; writes measured/NETWORK-ESTIMATOR.npz

256 sensitivity and 512 calibration images, bits 2, 4 and 8, the default corrections, KL to the float network.
"""

import numpy as np

import clado
from clado.data.sources import load_data, load_network
from clado.settings.schema import DataSettings, NetworkSettings, RunConfig
from tests.benchmarks.solver_instances import MEASURED, MEASURED_ESTIMATORS, MEASURED_NETWORKS

BITS = (2, 4, 8)


def measure(name: str) -> None:
    """Writes a file for each estimator."""
    loaded = load_network(NetworkSettings(source="zoo", name=name))
    network = clado.Network(loaded.model, loaded.example_input)
    slices = load_data(DataSettings(sensitivity_images=256, calibration_images=512), loaded.image_shape)
    space = network.search_space(bits=BITS)
    corrections = RunConfig.model_fields["corrections"].default
    prepared = clado.prepare(network, space, slices.calibration, corrections=corrections)
    for estimator in MEASURED_ESTIMATORS:
        matrix = clado.measure(network, space, slices.sensitivity, estimator=estimator, prepared=prepared)
        np.savez_compressed(
            MEASURED / f"{name}-{estimator}.npz", values=matrix.values, bits=BITS, sizes=[x.num_weights for x in space.layers]
        )
        print(name, estimator, matrix.values.shape, flush=True)


if __name__ == "__main__":
    MEASURED.mkdir(exist_ok=True)
    for network_name in MEASURED_NETWORKS:
        measure(network_name)
