"""Profile: the time of every layer at every option on this machine. It writes the table that the constraint `latency` reads.

Layers are timed inside whole networks, because their neighbours decide what is in the cache and which operators are fused. There
is one network for each pair of bit-widths, in which all layers have that pair. The runtime's profiler gives each layer's time.
"""

import csv
import io
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clado.bits import FLOAT, FLOAT_BITS, bits_text
from clado.errors import ConfigurationError, StoreError
from clado.exporting.native import lacking_options
from clado.exporting.runtimes import Logits, Runtime
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.records.text import write_text
from clado.run.opened_run import OpenedRun
from clado.run.searched import is_symmetric
from clado.settings.identity import fingerprint
from clado.space import Assignment, SearchSpace
from flows.progress import progress

FORMAT = "clado-profile/1"
PASSES, MOST_PASSES = 3, 50  # passes of each network in a turn, with and without the profiler
TURN_SECONDS = 0.05  # seconds that these passes take together, if the limits above allow it


@dataclass
class Turns:
    """The times of each turn. For each network: the seconds of a pass, of its layers, and of the rest."""

    key: str
    """What the times depend on. Turns with another key are not read."""
    facts: dict[str, Any]
    """Machine, versions, threads, batch."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """{network: {"seconds", "layers", "rest"}} of each turn."""

    @classmethod
    def resumed(cls, path: Path, key: str, facts: dict[str, Any]) -> "Turns":
        """The turns of a file, if they have the same key. Empty if there is no file."""
        if not path.is_file():
            return cls(key, facts)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            turns = list(document["turns"]) if document["key"] == key else []
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is no profile ({error}); name another file with --output, or remove it") from None
        return cls(key, facts, turns)

    def write(self, path: Path) -> None:
        """Writes the machine, versions, medians and every turn."""
        medians = {name: self.seconds(name) for name in (self.turns[0] if self.turns else {})}
        document = {"format": FORMAT, "key": self.key, **self.facts, "seconds": medians, "turns": self.turns}
        write_text(path, json.dumps(document, indent=1))

    def seconds(self, network: str) -> float:
        """Median seconds of a pass through a network."""
        return float(median(turn[network]["seconds"] for turn in self.turns))

    def layer_seconds(self, network: str, shares: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each layer in a network. Their sum is the time of a whole pass.

        The time of the rest of the network is divided among the layers by `shares`. The shares are the same in all networks. So
        if the rest takes the same time in two networks, the difference of their layers does not change.
        """
        layers = {name: median(turn[network]["layers"][name] for turn in self.turns) for name in shares}
        rest = median(turn[network]["rest"] for turn in self.turns)
        scale = self.seconds(network) / (sum(layers.values()) + rest)  # the profiler itself takes time
        return {name: scale * (layers[name] + shares[name] * rest) for name in shares}


def networks_of(space: SearchSpace) -> dict[str, Assignment]:
    """The networks to time, by name: float, and one for each pair of weight and activation bits of any layer."""
    named = {FLOAT: space.nothing}
    for bits, assignment in space.uniform_assignments():
        activation_bits = next((width for width in assignment.activation_bits if width is not None), None)
        if bits < FLOAT_BITS:
            named[bits_text(bits, activation_bits)] = assignment
    return named


def table_of(space: SearchSpace, turns: Turns, batch: int) -> str:
    """The CSV of the constraint `latency`: seconds of one image for each option."""
    macs = sum(layer.macs for layer in space.layers)
    shares = {layer.name: layer.macs / macs if macs else 1 / space.num_layers for layer in space.layers}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["layer", "bits", *(["activation_bits"] if space.has_activations else []), "seconds"])
    networks = networks_of(space)
    seconds = {name: turns.layer_seconds(name, shares) for name in networks}
    for layer, bits, activation_bits in space.options:
        name = space.layers[layer].name
        value = seconds[bits_text(bits, activation_bits)][name] / batch
        widths = [bits or FLOAT, *([activation_bits or ""] if space.has_activations else [])]
        table.writerow([name, *widths, f"{value:.6g}"])
    return text.getvalue()


def profile(run: OpenedRun, name: str, runtime: Runtime, path: Path, threads: int, batch: int, turns: int) -> Turns:
    """Times all networks in turns. Writes the CSV, and next to it a JSON file with the machine, versions and every turn.

    Turns that were already timed on the same machine with the same versions are not timed again.

    Args:
        run: The opened run. No image is read, because time does not depend on the pixels.
        name: The runtime's name.
        runtime: The runtime.
        path: The CSV.
        threads: Threads of the runtime.
        batch: Images of one pass.
        turns: How often each network is timed.
    """
    if path.suffix != ".csv":
        raise ConfigurationError(f"--output is {path}; expected a file .csv")
    space = run.space
    facts = {**machine(), "runtime": name, "versions": dict(runtime.versions()), "threads": threads, "batch": batch}
    layers = [[layer.name, layer.shape, layer.operator, layer.macs] for layer in space.layers]
    key = fingerprint([facts, layers, list(map(list, space.options)), list(run.float_network.image_shape)])
    timed, json_file = Turns.resumed(path.with_suffix(".json"), key, facts), path.with_suffix(".json")
    if len(timed.turns) < turns:
        with TemporaryDirectory() as folder:
            _time(run, runtime, timed, json_file, Path(folder), turns)
    timed.write(json_file)
    write_text(path, table_of(space, timed, batch))
    return timed


def _time(run: OpenedRun, runtime: Runtime, timed: Turns, json_file: Path, folder: Path, turns: int) -> None:
    space = run.space
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, *run.float_network.image_shape, generator=generator)
    # codes and ranges do not change the time, so the fast quantizer is used
    prepared = prepare(run.float_network, space, Recipe(WeightQuantizer("minmax"), "minmax"), [noise])
    networks = networks_of(space)
    images = np.ascontiguousarray(np.resize(noise.numpy(), (int(timed.facts["batch"]), *noise.shape[1:])))
    with progress("profiling", len(networks) * (1 + turns - len(timed.turns))) as advance:
        for number, assignment in enumerate(networks.values()):
            network, layers = prepared.deployed(assignment)
            runtime.write(folder / f"{number}-{runtime.file}", network, layers, noise)
            advance(1)
        files = {name: folder / f"{number}-{runtime.file}" for number, name in enumerate(networks)}

        def turned() -> None:
            advance(len(files))
            timed.write(json_file)

        time_turns(timed, runtime, files, images, space.names, turns, turned)


def time_turns(
    timed: Turns,
    runtime: Runtime,
    files: Mapping[str, Path],
    images: NDArray[np.float32],
    names: Sequence[str],
    turns: int,
    turned: Callable[[], None] = lambda: None,
) -> None:
    """Times networks and their layers in turns, and adds the turns to `timed`.

    Args:
        timed: The turns until now. Its facts name the number of threads.
        runtime: The runtime.
        files: The files of the networks, by name.
        images: The images of one pass, (N, C, H, W).
        names: Names of the layers.
        turns: The number of turns to reach.
        turned: Called after each turn.
    """
    threads = int(timed.facts["threads"])
    calls = {name: runtime.open(file, threads) for name, file in files.items()}
    while len(timed.turns) < turns:
        turn: dict[str, Any] = {}
        for name in list(files)[:: 1 if len(timed.turns) % 2 == 0 else -1]:
            first = _seconds(calls[name], images)  # another network ran before, so this pass does not count
            passes = int(min(max(TURN_SECONDS / max(first, 1e-6), PASSES), MOST_PASSES))
            seconds = [_seconds(calls[name], images) for _ in range(passes)]
            times = runtime.profile(files[name], threads, images, names, passes)
            turn[name] = {"seconds": median(seconds), "layers": dict(times.layers), "rest": times.rest}
        timed.turns.append({name: turn[name] for name in files})
        turned()


def _seconds(call: Logits, images: NDArray[np.float32]) -> float:
    begin = perf_counter()
    call(images)
    return perf_counter() - begin


def machine() -> dict[str, Any]:
    """The processor, its cores, and the operating system."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0] if lines else processor
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.system()}


def profile_text(space: SearchSpace, timed: Turns, path: Path) -> str:
    """The times for the terminal: each whole network compared with float, and how to use the table."""
    facts, base = timed.facts, timed.seconds(FLOAT)
    rows = [
        f"  {name:<6} {1000 * timed.seconds(name):9.3f} ms  {base / timed.seconds(name):5.2f} times as fast as float"
        for name in networks_of(space)
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        (
            f"{facts['processor']}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}, "
            f"{facts['batch']} image{'s' if facts['batch'] > 1 else ''} a pass, medians of {len(timed.turns)} turns; {versions}",
            *rows,
            f"Wrote {path}. In the settings: runtime: {{name: {facts['runtime']}}} and budgets: {{latency: [SECONDS]}}",
        )
    )


def lacking_text(run: OpenedRun, name: str, runtime: Runtime) -> str:
    """The options that a runtime does not run natively, grouped by reason, for the terminal."""
    lacking = lacking_options(run.space, runtime, is_symmetric(run.config))
    if not lacking:
        return f"  {name} runs every option natively"
    reasons: Counter[str] = Counter(lacking.values())
    return "\n".join(
        (
            f"  {name} does not run {len(lacking)} of {run.space.num_options} options natively:",
            *(f"    {count:>4} options: {reason}" for reason, count in reasons.most_common()),
        )
    )


def predicted_seconds(path: Path, space: SearchSpace, assignment: Assignment) -> float:
    """Seconds that an assignment takes for one image, according to a table."""
    from clado.choosing.constraints import constraint

    return constraint("latency", space, float("inf"), path=path).value(space, assignment)
