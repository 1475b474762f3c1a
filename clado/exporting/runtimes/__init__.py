"""Runtimes: libraries that execute a deployed network, with their kernels and times.

To add a runtime, add a file to this folder with an object `runtime = Runtime(...)`, and subclass
`RuntimeContract` (tests/contracts/runtime.py) for it. The file's name is the runtime's name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clado.network.network import Network, Replaced
from clado.plugins import load
from clado.space import Layer

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Logits (N, classes) of normalised images (N, C, H, W)."""


@dataclass(frozen=True)
class LayerTimes:
    """Where one pass through a network spends its time."""

    layers: Mapping[str, float]
    """Median seconds of each searched layer, by name."""
    rest: float
    """Median seconds of everything else: additions, pooling, attention, changes of layout."""


@dataclass(frozen=True)
class Runtime:
    """What the rest of the code must know about a runtime."""

    title: str
    """What it is called in documents."""
    file: str
    """Name of the file that it reads."""
    requirements: tuple[str, ...]
    """Packages that `loader` needs, for pip, with NumPy and Pillow."""
    loader: str
    """Text of a Python file that reads deployment.json and the network from its folder.

    It defines HERE (the folder), FACTS (deployment.json) and run(images (N, C, H, W)) -> logits.
    """
    lacks_kernel: Callable[[Layer, int | None, int | None, bool], str | None]
    """(layer, weight bits, activation bits, symmetric) -> the reason why the option has no native kernel, or None.

    If the weight bits are None, the layer is in float.
    """
    write: Callable[[Path, Network, Replaced, Tensor], None]
    """(file, network, layers by index, calibration images (N, C, H, W)) -> the file, written for its kernels.

    Images give the ranges of results that clado has no grid for.
    """
    open: Callable[[Path, int], Logits]
    """(file, threads) -> the function that computes logits."""
    profile: Callable[[Path, int, NDArray[np.float32], Sequence[str], int], LayerTimes]
    """(file, threads, images of one pass, names of layers, passes) -> the times, by the runtime's profiler."""
    kernels: Callable[[Path], Mapping[str, int]]
    """How often each operator is in the graph that is executed, after the runtime's optimisation."""
    code_bytes: Callable[[Path], Mapping[str, int]]
    """Bytes in the file of each searched layer's codes, scales and zero points, by name. Shared tensors count once."""
    session_entries: Callable[[Path], Mapping[str, str]]
    """Settings for opening a file, on any machine. `loader` reads them from deployment.json, under `session`.

    `open` and `loader` may leave out a setting that this machine does not need.
    """
    versions: Callable[[], Mapping[str, str]]
    """Versions that its times and results depend on, by name."""


def runtime_of(name: str) -> Runtime:
    """The runtime of a name, or of `package.module:name`."""
    runtime: Runtime = load("runtimes", name)
    return runtime


def median_seconds(
    calls: Mapping[str, Callable[[], object]], turns: int, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each call. Calls take turns, so that a busy moment of the machine affects all of them.

    Args:
        calls: What to time, by name. Each is called once before it is timed.
        turns: How often each is timed.
        advance: Called after each turn.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        # every second turn runs backwards, so that no call is always the last one of a turn
        for name, call in list(calls.items())[:: 1 if turn % 2 == 0 else -1]:
            begin = perf_counter()
            call()
            seconds[name].append(perf_counter() - begin)
        advance()
    return {name: median(values) for name, values in seconds.items()}
