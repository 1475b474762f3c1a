"""How close measuring is to its floor, as ratios within one run on this machine; writes MEASURE.md. Run: make bench.

The *floor* of a tile is what ordinary inference spends behind its cuts. It is Σ over pairs (or singles) of the operators from the
cut on, each at the batch size where it is fastest. They are timed one by one within forwards of the whole network. *Suffix
forwards* are the same sum of whole runs from each cut, each at its best batch size. Both are of the network as it is measured,
batch norm folded into convolutions. Times are CPU seconds of the process at a steady speed (`SteadyClock`). Other processes on
the machine disturb these least. It runs in one thread, and memory is allocated as in the workers of a run.
"""

import argparse
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from clado import criteria
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, Tile
from clado.measuring.workbench import Workbench
from clado.network.graph import Graph, GraphState
from clado.network.network import Network, prefers_channels_last
from clado.network.tracing import compile_graph
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.storage.measurement_store import MeasurementStore
from flows.clusters._dask import ALLOCATOR
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
SIZE, IMAGES, MANY, BITS, ROUNDS = 64, 16, 64, (2, 4, 8), 5
BATCHES = (8, 16, 32, 64, 128, 256, 512)
PARTS = ("forwards", "loop over instructions", "stacking", "criterion", "write", "rest")


def transformer() -> nn.Module:
    """Six blocks of width 192 on 8 × 8 patches."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=SIZE, patch_size=8, num_layers=6, num_heads=6, hidden_dim=192, mlp_dim=768)


def by_name(name: str) -> nn.Module:
    """A torchvision network with random weights."""
    from torchvision import models

    model: nn.Module = models.get_model(name, weights=None)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: by_name("resnet18"),
    "mobilenet_v2": lambda: by_name("mobilenet_v2"),
    "vit_6_blocks": transformer,
}


@dataclass(frozen=True)
class Result:
    """Seconds of CPU for one sample block, and counts."""

    name: str
    layers: int
    pairs: int
    whole_macs: int
    floor: dict[str, float]
    least: float
    suffixes: dict[str, float]
    measured: dict[str, float]
    speeds: tuple[float, float]
    floor_rate: float
    one_batch_rate: float
    inference_rate: float
    swapping: float
    whole_over_suffix: float
    profile: dict[str, float]
    sweep: list[tuple[str, float, list[float]]]


def noise(batch: int, channels_last: bool) -> Tensor:
    """Images in the layout that the network is measured in."""
    images = torch.randn(batch, 3, SIZE, SIZE)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


class SteadyClock:
    """CPU seconds of the process, as if the machine kept the speed that it had at first.

    A machine's speed drifts by a fifth within minutes, more than what is to be told apart. So the same work is timed again
    whenever `EVERY` seconds have passed. What passes next is scaled by what that work took at first. Its own time is left out.
    """

    EVERY = 1.0

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._repeats = work, 1
        self._repeats = 1 + int(0.03 / self._took())
        self._at_first = float(np.median([self._took() for _ in range(9)]))
        self._passed, self._speed, self._since = 0.0, 1.0, time.process_time()
        self.speeds: list[float] = []

    def _took(self) -> float:
        times = []
        for _ in range(3):
            begin = time.process_time()
            for _ in range(self._repeats):
                self._work()
            times.append(time.process_time() - begin)
        return float(np.median(times))

    def now(self) -> float:
        """Seconds since the start."""
        spent = time.process_time() - self._since
        passed = self._passed + spent * self._speed
        if spent > self.EVERY:
            self._passed, self._speed = passed, self._at_first / self._took()
            self.speeds.append(self._speed)
            self._since = time.process_time()
        return passed


Now = Callable[[], float]


def seconds(work: Callable[[], Any], now: Now, repeats: int = 3) -> float:
    """Least seconds of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin = now()
        work()
        times.append(now() - begin)
    return min(times)


@torch.inference_mode()
def forward_seconds(
    graph: Graph, model: nn.Module, channels_last: bool, now: Now
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Seconds for one image.
    The first three are of each instruction: at its best batch, at least, and at the batch that is the module's best. The last is
    of the module itself at that batch.

    All but the second are medians, of forwards that take turns: the least time of each of a hundred operators is no time that a
    forward takes.
    """
    typical, least, whole = [], [], []
    for batch in BATCHES:
        images = noise(batch, channels_last)
        steps, runs = [], []
        for _ in range(5):
            begin = now()
            model(images)
            runs.append(now() - begin)
            state, times = graph.start(images), []
            for k in range(len(graph.instructions)):
                begin = now()
                state = graph.run(state, k + 1, {})
                times.append(now() - begin)
            steps.append(times)
        typical.append(np.median(steps[1:], 0) / batch)  # the first warms up
        least.append(np.min(steps[1:], 0) / batch)
        whole.append(float(np.median(runs[1:])) / batch)
    return np.min(typical, 0), np.min(least, 0), typical[int(np.argmin(whole))], min(whole)


def resumable(network: Network, batch: int) -> Iterator[GraphState]:
    """The state of a run on noise at the cut of each layer."""
    state = network.begin(torch.randn(batch, 3, SIZE, SIZE))
    for j in range(len(network.layers)):
        state = network.advance(state, j)
        yield state


@torch.inference_mode()
def suffix_seconds(network: Network, now: Now) -> np.ndarray:
    """Seconds for one image of a run from the cut of each layer on, at each batch size: (BATCHES, layers)."""
    return np.array(
        [[seconds(lambda s=s: network.finish(s), now, 2) / batch for s in resumable(network, batch)] for batch in BATCHES]
    )


@torch.inference_mode()
def typical_suffix_seconds(network: Network, batches: Sequence[int], now: Now) -> np.ndarray:
    """Seconds for one image of a run from the cut of each layer on, each at its batch size, timed once."""
    spent = np.empty(len(batches))
    for batch in sorted(set(batches)):
        for j, state in enumerate(resumable(network, batch)):
            if batches[j] == batch:
                begin = now()
                network.finish(state)
                spent[j] = (now() - begin) / batch
    return spent


def fused(model: nn.Module) -> nn.Module:
    """The module as one would run it: batch norm folded into convolutions."""
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        return model
    module: nn.Module = fuse(model).eval()
    return module


@torch.inference_mode()
def swapping_seconds(model: nn.Module, bench: Workbench, now: Now, trials: int = 6) -> float:
    """Seconds for one image of a pair done the plain way: copy two weights in, run the module whole, copy them back."""
    parameters = dict(model.named_parameters())
    draw, space = random.Random(0), bench.space
    best = np.inf
    for batch in BATCHES:
        images = noise(batch, bench.network.channels_last)
        begin = now()
        for _ in range(trials if batch < 128 else 2):
            chosen = draw.sample(range(space.num_options), 2)
            for option in chosen:
                parameters[space.layers[space.options[option].layer].name].copy_(bench.quantized[option].weight)
            model(images)
            for option in chosen:
                layer = space.options[option].layer
                parameters[space.layers[layer].name].copy_(originals(bench)[layer])
        best = min(best, (now() - begin) / (trials if batch < 128 else 2) / batch)
    return best


_ORIGINALS: dict[int, tuple[Tensor, ...]] = {}


def originals(bench: Workbench) -> tuple[Tensor, ...]:
    """Copies of the float weights, made once."""
    if id(bench) not in _ORIGINALS:
        _ORIGINALS[id(bench)] = tuple(weight.clone() for weight in bench.network.weights)
    return _ORIGINALS[id(bench)]


class Profile:
    """Accumulates the seconds of what measuring calls, part by part, and the instructions that forwards execute."""

    def __init__(self, graph: Graph, now: Now) -> None:
        self.seconds: dict[str, float] = {}
        self.now = now
        self.instructions, run, bind = 0, graph.run, criteria.bind

        def counted(state: GraphState, stop: int, replaced: Any) -> GraphState:
            self.instructions += stop - state.position
            return run(state, stop, replaced)

        graph.run = self.timed("forwards", counted)  # type: ignore[method-assign]
        graph.stack = self.timed("stacking", graph.stack)  # type: ignore[method-assign]
        self.bind = lambda *arguments: self.timed("criterion", bind(*arguments))

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its seconds added to a part."""

        def call(*arguments: Any) -> Any:
            begin = self.now()
            result = work(*arguments)
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - begin
            return result

        return call

    def parts(self, total: float, per_instruction: float) -> dict[str, float]:
        """Share of each part in `total` seconds; the interpreter's loop is taken out of the forwards."""
        loop = self.instructions * per_instruction
        parts = {**self.seconds, "forwards": self.seconds["forwards"] - loop, "loop over instructions": loop}
        return {name: spent / total for name, spent in parts.items()} | {"rest": 1 - sum(self.seconds.values()) / total}


def loop_seconds(model: nn.Module, now: Now) -> float:
    """Seconds of the interpreter for one instruction: a run whose operators do nothing."""
    graph = compile_graph(model, torch.randn(1, 3, SIZE, SIZE), lambda _: False)
    nothing = torch.empty(0)
    from dataclasses import replace

    graph.instructions = tuple(replace(step, function=lambda *_, **__: (nothing,) * 3) for step in graph.instructions)
    state = GraphState({graph.input_slot: nothing}, 0, 1, 1)
    return seconds(lambda: graph.run(state, len(graph.instructions), {}), now, 50) / len(graph.instructions)


def batch_sweep(network: Network, now: Now) -> list[tuple[str, float, list[float]]]:
    """At three cuts: (layer, MB of one image's values, seconds for one image at each batch relative to the best)."""
    rows = []
    for j in (1, len(network.layers) // 3, 2 * len(network.layers) // 3):
        times = []
        for batch in BATCHES:
            state = network.advance(network.begin(torch.randn(batch, 3, SIZE, SIZE)), j)
            times.append(seconds(lambda s=state: network.finish(s), now, 2) / batch)
        peak = network.places[j].cut.peak_bytes_per_image / 1e6
        rows.append((network.layers[j].name, peak, [t / min(times) for t in times]))
    return rows


def over_suffixes(bench: Workbench, images: int, batches: Sequence[int], store: Path, now: Now) -> dict[str, float]:
    """Time of the tiles of single options over that of their forwards from the cut on, each at its batch size. They take
    turns: medians."""
    seconds: dict[str, list[float]] = {"singles": [], "gram": []}
    measure_tile(bench, Tile("singles", 0))  # warms up
    for _ in range(ROUNDS):
        behind = typical_suffix_seconds(bench.network, batches, now)
        forwards = images * sum(behind[option.layer] for option in bench.space.options)
        for kind, ratios in seconds.items():
            begin = now()
            tile = Tile(kind, 0)
            MeasurementStore.open(store).write(tile, measure_tile(bench, tile))
            ratios.append((now() - begin) / forwards)
    return {kind: float(np.median(ratios)) for kind, ratios in seconds.items()}


def measure(name: str, folder: Path) -> Result:
    """Everything about one network."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    channels_last = prefers_channels_last(model, torch.device("cpu"))  # as `clado run` lays it out
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    images = torch.randn(MANY, 3, SIZE, SIZE)
    network = Network(model, images[:1], channels_last=channels_last)
    space = network.search_space(BITS)

    def workbench(count: int) -> Workbench:
        prepared = prepare(network, space, Recipe(WeightQuantizer("minmax")))
        return Workbench(prepared, "kl_to_float", ((0, count),), lambda a, b: (images[a:b], None))

    bench = workbench(IMAGES)
    graph = bench.network.engine
    assert isinstance(graph, Graph)
    plan = Plan(space, ((0, IMAGES),), ("singles", "pairs", "gram"), space.num_options)
    MeasurementStore.create(folder / f"{name}.zarr", plan, {}, {}, {})

    halfway = network.advance(network.begin(images), space.num_layers // 2)
    clock = SteadyClock(lambda: network.finish(halfway))
    now = clock.now
    operators, least, one_batch, inference = forward_seconds(graph, fused(model), channels_last, now)
    resumed = suffix_seconds(bench.network, now)
    best = [BATCHES[k] for k in resumed.argmin(0)]
    offsets = space.offsets
    pairs = [(offsets[j + 1] - offsets[j]) * offsets[j] for j in range(space.num_layers)]

    def summed(behind: list[float]) -> dict[str, float]:
        singles = IMAGES * sum(behind[option.layer] for option in space.options)
        totals = {"pairs": IMAGES * sum(n * s for n, s in zip(pairs, behind, strict=True)), "singles": singles, "gram": singles}
        return totals | {f"{kind} of {MANY}": singles * MANY / IMAGES for kind in ("singles", "gram")}

    swapping = swapping_seconds(model, bench, now)
    sweep = batch_sweep(bench.network, now)
    per_instruction = loop_seconds(model, now)

    watched = workbench(IMAGES)
    assert isinstance(watched.network.engine, Graph)
    measure_tile(watched, Tile("singles", 0))  # warms up
    profile = Profile(watched.network.engine, now)
    begin = now()
    with patch.object(criteria, "bind", profile.bind):
        sums = measure_tile(watched, tile := next(tile for tile in plan.tiles if tile.kind == "pairs"))
    profile.timed("write", lambda: MeasurementStore.open(folder / f"{name}.zarr").write(tile, sums))()
    measured = {"pairs": now() - begin}
    shares = profile.parts(measured["pairs"], per_instruction)
    ratios = {}
    for count in (IMAGES, MANY):
        for kind, ratio in over_suffixes(workbench(count), count, best, folder / f"{name}.zarr", now).items():
            ratios[kind if count == IMAGES else f"{kind} of {count}"] = ratio
    floor, least_floor = (
        summed([float(times[place.cut.position :].sum()) for place in graph.layers]) for times in (operators, least)
    )
    suffixes = summed(resumed.min(0).tolist())
    measured |= {kind: ratio * suffixes[kind] for kind, ratio in ratios.items()}
    return Result(
        name,
        space.num_layers,
        sum(pairs),
        graph.macs,
        floor,
        least_floor["pairs"],
        suffixes,
        measured,
        (min(clock.speeds), max(clock.speeds)),
        2 * graph.macs / float(operators.sum()) / 1e9,
        2 * graph.macs / float(one_batch.sum()) / 1e9,
        2 * graph.macs / float(inference) / 1e9,
        sum(pairs) * IMAGES * swapping,
        sum(pairs) * IMAGES * float(operators.sum()) / floor["pairs"],
        shares,
        sweep,
    )


def machine() -> str:
    """Processor, memory, versions."""
    import psutil

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread"
    )


def report(results: Sequence[Result]) -> str:
    """The Markdown page."""
    turned = [name for name, make in NETWORKS.items() if prefers_channels_last(make(), torch.device("cpu"))]
    lines = [
        "# Measuring against its floor",
        "",
        "Written by `make bench` (tests/benchmarks/bench_measure.py). Ratios within one run; times are CPU seconds "
        "at a steady speed.",
        "",
        f"Machine: {machine()}.",
        "",
        f"Setting: {SIZE} × {SIZE} pixels, bits {BITS}, all layers, all pairs, `kl_to_float`, one worker. A sample block has "
        f"{IMAGES} images, or {MANY} in the columns that say so. A tile is executed as in the flow, the checksummed Zarr write "
        "included. Memory is laid out as `clado run` does on this machine: "
        f"{', '.join(turned) or 'none'} in channels_last.",
        "",
        "| network | layers | pairs | floor s | pairs s | **pairs ÷ floor** (goal 1.25) | pairs ÷ least times | "
        "pairs ÷ suffix forwards | GFLOP/s of the floor's operators, whole network | at inference's batch | "
        "of the module's inference | gain over swapping | whole ÷ suffix | gain ÷ that (goal 0.8) | "
        "outside forwards (goal 2 %) | speed |",
        "|---|" + "--:|" * 15,
    ]
    for r in results:
        gain = r.swapping / r.measured["pairs"]
        ratio = {kind: r.measured[kind] / r.floor[kind] for kind in r.measured}
        cells = [
            *(r.name, str(r.layers), f"{r.pairs:,}", f"{r.floor['pairs']:.1f}", f"{r.measured['pairs']:.1f}"),
            f"**{ratio['pairs']:.2f}**",
            f"{r.measured['pairs'] / r.least:.2f}",
            f"{r.measured['pairs'] / r.suffixes['pairs']:.2f}",
            *(f"{rate:.0f}" for rate in (r.floor_rate, r.one_batch_rate, r.inference_rate)),
            *(f"{gain:.1f}", f"{r.whole_over_suffix:.1f}"),
            *(f"{gain / r.whole_over_suffix:.2f}", f"{100 * (1 - r.profile['forwards']):.1f} %"),
            "{:.2f} to {:.2f}".format(*r.speeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "- *floor*: Σ over pairs of the operators behind the cut, each at its best batch size of "
        f"{', '.join(map(str, BATCHES))}. An operator's time is the median within forwards of the whole network.",
        "- *least times*: the same with the least time of each operator, which no forward attains for all of them.",
        "- *suffix forwards*: Σ over pairs of one run of everything behind the cut, at its best batch size.",
        "- *inference*: the module itself, batch norm folded, in inference mode at its best batch size. Times are medians of "
        "forwards that take turns with the floor's. Its one batch does not suit every operator, so the floor's rate is the "
        "higher one. *At inference's batch* is the rate of the floor's operators at that one batch.",
        "- *swapping*: two weights are copied into the module, it runs whole at its best batch size, and the weights are copied "
        "back.",
        "- *outside forwards*: the share of the pairs' time that is not spent in operators; the profile below.",
        "- *speed*: the machine's least and greatest speed meanwhile, over the one at first. All times are scaled to that. A run "
        f"from the middle of the network is timed again after every {SteadyClock.EVERY:g} s.",
        "",
        "## Profile of the pairs",
        "",
        "Share of CPU time in percent.",
        "",
        "| network | " + " | ".join(PARTS) + " |",
        "|---|" + "--:|" * len(PARTS),
    ]
    for r in results:
        lines.append(f"| {r.name} | " + " | ".join(f"{100 * r.profile.get(part, 0.0):.2f}" for part in PARTS) + " |")
    lines += [
        "",
        "## Estimators of single options",
        "",
        "Their cost is given over that of one forward from the cut of each option's layer on (goal 1.15), and over the floor's "
        f"operators. Forwards and tiles take turns, and figures are medians of {ROUNDS} rounds. A `gram` tile, which "
        "gauss_newton reads, holds what layerwise reads.",
        "",
        f"| network | gauss_newton, {MANY} images | {IMAGES} images | layerwise, {MANY} images | {IMAGES} images | "
        f"over the operators: gauss_newton, {MANY} images | layerwise, {MANY} images |",
        "|---|" + "--:|" * 6,
    ]
    many = (f"gram of {MANY}", f"singles of {MANY}")
    for r in results:
        cells = [f"{r.measured[kind] / r.suffixes[kind]:.2f}" for kind in (many[0], "gram", many[1], "singles")]
        cells += [f"{r.measured[kind] / r.floor[kind]:.2f}" for kind in many]
        lines.append(f"| {r.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Batch size",
        "",
        "Seconds for an image of a run resumed at a layer, relative to the best batch. A run is fastest while the batch is "
        "large, and batch × values of one image stay within the 32 MB that the cache holds. The default follows from that.",
        "",
        "| network, resumed at | MB an image | " + " | ".join(map(str, BATCHES)) + " |",
        "|---|" + "--:|" * (1 + len(BATCHES)),
    ]
    for r in results:
        for layer, peak, times in r.sweep:
            lines.append(f"| {r.name} {layer} | {peak:.2f} | " + " | ".join(f"{t:.2f}" for t in times) + " |")
    return filled("\n".join(lines) + "\n")


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=HERE / "MEASURE.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= ALLOCATOR  # heeded from a process's start on
    one_thread = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,), max_tasks_per_child=1)
    results = []
    with tempfile.TemporaryDirectory() as folder, one_thread:
        for r in one_thread.map(measure, arguments.networks, [Path(folder)] * len(arguments.networks)):
            results.append(r)
            print(r.name, {kind: round(r.measured[kind] / r.floor[kind], 3) for kind in r.measured}, r.profile, flush=True)
    arguments.output.write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
