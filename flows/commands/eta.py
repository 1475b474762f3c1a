"""A short measurement that turns a plan into an ETA."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clado.choosing.proposals import merge_limits, widest_uniform
from clado.interaction.estimators import estimator_of, unreported_estimators
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Tile
from clado.network.network import Network
from clado.quantization.preparation import Recipe, equalized, observed, prepare, prepare_layer
from clado.quantization.quantizers import WeightQuantizer
from clado.quantization.reconstruction import EFFORTS
from clado.quantization.sweep import LayerInput
from clado.run.opened_run import OpenedRun
from clado.run.preparation import LayerTask, SweepTask

LIMIT_SECONDS = 20.0
STARTS = 5.0  # start-up, recording and shutdown of a run, in multiples of the start of this process (tests/benchmarks/RUN.md)

TRAINING_COST = 4.0  # a training step of one image, in forward passes: a rough value, for the ETA only

KINDS = {"sweep": SweepTask, "layer": LayerTask}


@dataclass(frozen=True)
class Eta:
    """Expected seconds of each phase, if workers are as fast as this process."""

    around: float
    """Start-up, recording and shutdown."""
    preparing: float
    """Preparing the layers that are not on disk yet."""
    measuring: float
    """Measuring tiles that the store lacks."""
    reconstructing: float
    """Reconstructing answers, if the effort is not fast."""
    evaluation: float
    """Evaluating on the validation set."""
    num_networks: int
    """Most networks that are evaluated."""

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return self.around + self.preparing + self.measuring + self.reconstructing + self.evaluation


def probe(run: OpenedRun, own_start: float) -> Eta:
    """Times some whole forward passes, two layers and small tiles for 20 s, and scales the times. Writes nothing.

    `own_start` is the number of seconds that this process needed until its run was open.
    """
    plan, space, workers, work = run.plan, run.space, run.config.cluster.workers, run.workload
    begin = time.perf_counter()
    forward = _seconds_per_image(run)
    # layers of the plan's tiles, but rounded the fast way: the values of weights do not change the time
    quick = prepare(run.float_network, space, Recipe(WeightQuantizer("minmax"), "minmax"), run.preparation.calibration[:1])
    bench = run.evaluation.workbench(quick)
    # a tile has another rate than whole forward passes; if no small tile fits into the limit, their rate is used
    rate, done, spent = forward / work.macs, 0, 0.0
    rows = max(1, min(space.num_options, plan.rows_per_tile) // 8)
    warm_up = Tile("singles", 0)
    pairs = [Tile("pairs", 0, 0, first, first + rows) for first in range(0, space.num_options - rows, 2 * rows)]
    for tile in [warm_up, warm_up, *(pairs if "pairs" in plan.kinds else [])]:
        if time.perf_counter() - begin + 1.5 * plan.macs(tile, work) * rate > LIMIT_SECONDS:
            break
        seconds, macs = _seconds(run, partial(measure_tile, bench, tile)), plan.macs(tile, work)
        # the second warm-up counts: the first one loads images and compiles kernels
        spent, done = (seconds, macs) if tile is warm_up else (spent + seconds, done + macs)
        rate = spent / done
    measuring = sum(plan.macs(tile, work) for tile in run.identity.missing_tiles()) * rate / workers
    least, most = num_networks(run)
    networks = (least + most) // 2  # a mean, because estimators agree on some budgets
    plain = len(run.budgets) if run.config.corrections else 0  # the chosen bits without corrections
    validation = (networks + plain) * len(run.slices.validation)
    choosing = (networks + num_competing(run)) * len(run.decision) + sum(reestimation_images(run)) // 2
    evaluation = (validation + choosing) * forward / workers
    return Eta(STARTS * own_start, _preparing(run), measuring, _reconstructing(run, forward), evaluation, most)


def eta_text(run: OpenedRun, own_start: float) -> str:
    """The ETA in a line."""
    eta = probe(run, own_start)
    return (
        f"  ETA: about {eta.total:.0f} s: start-up, recording and shutdown {eta.around:.0f}, preparing {eta.preparing:.0f}, "
        f"measuring {eta.measuring:.0f}, "
        + (f"reconstructing {eta.reconstructing:.0f}, " if eta.reconstructing else "")
        + f"evaluation {eta.evaluation:.0f} ({eta.num_networks} networks of "
        f"{len(run.slices.validation):,} images at most), on {run.config.cluster.workers} workers as fast as this process"
    )


def num_networks(run: OpenedRun) -> tuple[int, int]:
    """How many networks a run evaluates: at least (if all estimators agree), and at most (if no two agree).

    They are float, uniform, and for each budget the answer of each estimator and the chosen one.
    """
    budgets, limits, space = run.budgets, run.limits, run.space
    uniform = {widest_uniform(space, merge_limits(budget.limit(space), limits)) for budget in budgets}
    least = 1 + len(uniform) + len(budgets)
    return least, least + len(budgets) * len(run.config.estimators)


def num_competing(run: OpenedRun) -> int:
    """Most assignments that are measured on the decision set and have no row in the table."""
    named = run.config.estimators
    uncorrected = 5 if run.config.corrections else 0  # uniform and layerwise; the first and chosen bits otherwise corrected
    variants = 2 * sum(estimator_of(name).convexity == "clip_psd" for name in named)
    unreported = len(unreported_estimators(named, run.plan.kinds))
    return len(run.budgets) * (variants + unreported + uncorrected + run.config.search.evaluations)


def num_reconstructed(run: OpenedRun) -> int:
    """The most networks that are reconstructed."""
    return 0 if run.config.effort == "fast" else len(run.budgets) * EFFORTS[run.config.effort].proposals


def _reconstructing(run: OpenedRun, forward: float) -> float:
    """Seconds of reconstructing, from the seconds of a forward pass of one image. Each network is one task."""
    networks = num_reconstructed(run)
    if not networks:
        return 0.0
    rounds = -(-networks // run.config.cluster.workers)
    return rounds * EFFORTS[run.config.effort].trained_images * TRAINING_COST * forward


def reestimation_images(run: OpenedRun) -> tuple[int, int]:
    """Forward images of final corrections: if they help at no budget, and if they help at all of them."""
    most = num_networks(run)[1] + num_competing(run)
    images = run.preparation.images_per_reestimation
    return (1 + len(run.budgets)) * images, (1 + most) * images


def _preparing(run: OpenedRun) -> float:
    """Seconds to prepare what is absent. One batch of images in each sweep and two layers are timed, and scaled by their cost."""
    preparation, network = run.preparation, run.float_network
    tasks = [task for stage in preparation.stages() for task in stage]
    if not tasks:
        return 0.0
    batch, layers = preparation.calibration[:1], range(run.space.num_layers)
    seconds, begin = 0.0, time.perf_counter()
    if not preparation.files().network_file.exists():
        blocks = [observed(network, run.recipe, batch)]
        equalized(network, run.recipe, blocks)
        seconds += time.perf_counter() - begin  # in one process
    if observations := preparation.observations():
        spent = _seconds(run, partial(observed, network, run.recipe, batch))
        cost = sum(task.cost for task in observations)
        seconds += cost / preparation.observation_cost(len(batch[0])) * spent / run.config.cluster.workers
    for plain in (False, True):
        work = {name: sum(t.cost for t in tasks if isinstance(t, kind) and t.plain == plain) for name, kind in KINDS.items()}
        gathered: dict[int, LayerInput] = {}
        for sweep in preparation.sweeps(plain):
            if not sweep.on_grids and work["sweep"]:
                gathered = sweep.gather(network, batch[0], 0, layers)  # loads and compiles kernels
                spent = _seconds(run, partial(sweep.gather, network, batch[0], 0, layers))
                rate = spent / preparation.sweep_cost(sweep, layers, len(batch[0]))
                seconds += work["sweep"] * rate / run.config.cluster.workers
        if work["layer"]:
            by_cost = sorted(layers, key=lambda layer: preparation.layer_cost(plain, layer))
            timed = by_cost[len(by_cost) // 2], by_cost[-1 - len(by_cost) // 10]
            recipe = run.recipe.plain if plain else run.recipe
            one_by_one = (partial(prepare_layer, network, run.space, recipe, layer, gathered.get(layer)) for layer in timed)
            spent = sum(_seconds(run, function) for function in one_by_one)
            cost = sum(preparation.layer_cost(plain, layer) for layer in timed)
            seconds += work["layer"] * spent / cost / run.config.cluster.workers
    return seconds


def _seconds_per_image(run: OpenedRun) -> float:
    """Seconds of a whole forward pass for one image. The timed batches grow from one image until they take a second."""
    images, count, most = run.slices.validation, 1, run.float_network.images_at_once
    network, _ = run.float_network.folded()  # as networks are evaluated
    while True:
        batch, _ = images.load(0, count)
        forward = partial(_finished_logits, network, batch.to(network.device))
        forward()  # compiles kernels for this shape
        seconds = _seconds(run, forward)
        if seconds > 1.0 or count >= min(most, len(images)):
            return seconds / len(batch)
        count = min(4 * count, most, len(images))


def _seconds(run: OpenedRun, function: Callable[[], object]) -> float:
    """Seconds of a call while other processes compute the same. They stand for the workers, which share memory and caches."""
    cluster = run.config.cluster
    here = cluster.name in ("local", "inline") and run.float_network.device.type == "cpu"
    at_once = min(cluster.workers, os.cpu_count() or 1) if here else 1

    def timed(_: int) -> float:
        torch.set_num_threads(cluster.threads_per_worker)
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(timed, range(at_once))) / at_once


def _finished_logits(network: Network, images: Tensor) -> Tensor:
    """Logits on the CPU, so that the timer waits for a GPU."""
    return network.logits(images).cpu()
