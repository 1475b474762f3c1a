"""Where do interactions help? Networks × bits × activations × sensitivity sets × draws × {plain, corrected} × methods × budgets.

    python -m tests.benchmarks.study measure --data FOLDER [--jobs 2]   appends to study.jsonl; resumable, a line a cell
    python -m tests.benchmarks.study_confirm --data FOLDER             top-1 on images that no rule was picked on
    python -m tests.benchmarks.study_table                             writes STUDY.md and its plots
    python -m tests.benchmarks.study record [--uri URI]                each cell as a run of MLflow, once

`make study DATA=FOLDER` does all four. FOLDER holds Fashion-MNIST's idx files. A sensitivity set is drawn from the training
images that no network of the zoo was trained on: its 1,024 sensitivity images and the 3,000 that chose the checkpoint. Sets of
one size share no image (a cell fails otherwise), and the larger ones hold the smaller. Calibration images are 512 of the zoo's
1,024. Top-1 and loss are of the 10,000 test images, on which no answer is chosen (study_confirm.py: what the rule was picked on).
A network's cells run in one process, on a GPU where there is one; an assignment that the file holds for the same case is not
evaluated again. A cell that lacks methods, as where one came later, gets a further line of them.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado.choosing import solvers
from clado.choosing.choice import Score, choose, surrogate
from clado.choosing.local_search import local_search, search
from clado.choosing.program import Program
from clado.choosing.proposals import Budget, Proposal, budgets_of, program_of, propose, propose_variants
from clado.choosing.solvers import Solve
from clado.data.images import ImageSlice
from clado.data.sources import load_data, load_network
from clado.data.sources.zoo import normalise
from clado.data.zoo.train import read_fashion_mnist, split_training_images
from clado.errors import DataError
from clado.evaluation import count
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds import tile_kind
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.scores import score_passes
from clado.measuring.workbench import Workbench, rows_per_tile
from clado.network.network import Network, prefers_channels_last
from clado.quantization.preparation import Prepared, Recipe, calibration_batches, prepare
from clado.records.results import CHOSEN, LOCAL_SEARCH, UNIFORM
from clado.settings.schema import DataSettings, NetworkSettings
from clado.space import Assignment, SearchSpace
from clado.tracking.stores import set_environment
from tests.benchmarks.study_table import DATA, NUM_CALIBRATION, key, lines, methods, rows

NETWORKS = ("resnet20_fashion_mnist", "mobilenetv2_fashion_mnist", "vit_fashion_mnist")
SPACES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # candidate bits of weights, of activations
    "w248": ((2, 4, 8), ()),
    "w248a8": ((2, 4, 8), (8,)),
    "w23468": ((2, 3, 4, 6, 8), ()),
}
ONLY = {"w23468": ("resnet20_fashion_mnist",)}  # spaces that some networks alone are studied in
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "corrected": ("equalization", "gptq", "output_statistics", "batchnorm_reestimation"),
}
BUDGETS = (2.25, 2.5, 3, 3.5, 4, 6)
SIZES = {64: 5, 256: 5, 1024: 2}  # images of a sensitivity set: how many draws
BLOCKS = {64: 16, 256: 28, 1024: 40}  # sample blocks: those of a smaller set are the first of a larger one
# images that estimators from gradients are measured on, at most: hawq's traces take longer than pairs on a GPU
UP_TO = {"hawq": 64, "mpqco": 256, "fisher": 256}
TEMPERED = ("tempered2", "tempered4", "tempered8")
ESTIMATORS = ("layerwise", "pairwise", "blockwise", "gauss_newton", *TEMPERED, "hawq", "mpqco", "fisher")
# The default of `clado run`, which `chosen` is: proposals of these and TEMPERED, a search, the least Brier score (`choose`).
# `chosen_least`: without TEMPERED, and the least measured loss. `chosen_full`: `clado run` with every estimator.
THRIFTY = ("layerwise", "gauss_newton")
READS: dict[str, tuple[str, ...]] = {  # the estimators of a method that is not one itself
    **{"uniform": ("layerwise",), "pairwise_raw": ("pairwise",)},  # uniform needs none, but a space comes with a matrix
    **{"chosen": (*THRIFTY, *TEMPERED), "chosen_least": THRIFTY, "chosen_full": ESTIMATORS},
}
SEARCH_EVALUATIONS, SEARCH_BATCH = 8, 4
EXPERIMENT = "clado-study"
Case = tuple[str, str, str]  # network, space, setting


# -- which images --------------------------------------------------------------------------------------------------------------


def draws(pool: int, sizes: Mapping[int, int] = SIZES, seed: int = 0) -> dict[tuple[int, int], NDArray[np.int64]]:
    """(size, draw) -> positions in the pool. Sets of one size are disjoint; a draw's larger sets begin with its smaller ones."""
    order = np.random.default_rng(seed).permutation(pool)
    parts: dict[tuple[int, int], NDArray[np.int64]] = {}
    used, previous = 0, 0
    for size in sorted(sizes):
        more = size - previous
        most = max(sizes.values())
        for draw in range(most if size < max(sizes) else sizes[size]):
            begin = used + draw * more
            part = order[begin : begin + more]
            if len(part) < more:
                raise DataError(f"{pool} images are too few for {sizes[size]} disjoint sets of {size}")
            parts[size, draw] = np.concatenate([parts[previous, draw], part]) if previous else part
        used, previous = used + most * more, size
    parts = {(size, draw): part for (size, draw), part in parts.items() if draw < sizes[size]}
    check_disjoint(parts)
    return parts


def check_disjoint(parts: Mapping[tuple[int, int], NDArray[np.int64]]) -> None:
    """Raises DataError where two sets of one size share an image."""
    for size in {size for size, _ in parts}:
        merge_limits = np.concatenate([part for (other, _), part in parts.items() if other == size])
        if len(np.unique(merge_limits)) < len(merge_limits):
            raise DataError(f"two sensitivity sets of {size} images share an image")


def pool_indices() -> NDArray[np.int64]:
    """Indices into the 60,000 training images, ascending: those that measured sensitivities or chose a checkpoint, and trained
    nothing."""
    split = split_training_images()
    return np.sort(np.concatenate([split["sensitivity"], split["selection"]]))


def images_not_trained_on(folder: Path) -> Tensor:
    """The pool, normalised."""
    return normalise(read_fashion_mnist(folder)["train_images"][pool_indices()])


# -- one network, space and setting ----------------------------------------------------------------------------------------------


@dataclass
class Study:
    """A network with its candidates prepared in one setting, and every figure known of it."""

    case: Case
    pool: Tensor
    budgets: tuple[float, ...] = BUDGETS
    num_validation: int | None = None
    top1: dict[str, tuple[float, float]] = field(default_factory=dict)
    _shipped: dict[Assignment, Any] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """A GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def validation(self) -> ImageSlice:
        """The test images."""
        return load_data(DataSettings(validation_images=self.num_validation), (1, 28, 28)).validation

    @cached_property
    def prepared(self) -> Prepared:
        """Every layer at every candidate."""
        name, space, setting = self.case
        bits, activations = SPACES[space]
        loaded = load_network(NetworkSettings(source="zoo", name=name))
        channels_last = prefers_channels_last(loaded.model, self.device)  # as `clado run` lays it out
        layout = torch.channels_last if channels_last else torch.preserve_format
        model = loaded.model.to(self.device, memory_format=layout)
        network = Network(model, loaded.example_input.to(self.device), channels_last=channels_last)
        searched = network.search_space(bits)
        if activations:
            searched = searched.with_activations(activations)
        corrections = tuple(c for c in SETTINGS[setting] if c != "batchnorm_reestimation" or network.engine.norms)
        calibration = load_data(DataSettings(calibration_images=NUM_CALIBRATION), loaded.image_shape).calibration
        images = calibration.load(0, NUM_CALIBRATION)[0].to(self.device)
        return prepare(network, searched, Recipe(corrections=corrections), calibration_batches(images, 256))

    @property
    def space(self) -> SearchSpace:
        """Layers and candidates."""
        return self.prepared.space

    def deployed(self, assignment: Assignment) -> Any:
        """The network and its layers as deployed, final corrections applied; made once."""
        if assignment not in self._shipped:
            changed = self.prepared.final(assignment) if self.prepared.has_final else {}
            # copies: what was made between large tensors would keep the heap from closing, 0.1 GB a time
            self._shipped[assignment] = {name: tensor.clone() for name, tensor in changed.items()}
        changed = self._shipped[assignment]
        network = self.prepared.network.updated(changed) if changed else self.prepared.network
        return network, self.prepared.chosen(assignment)

    def evaluated(self, assignment: Assignment) -> tuple[float, float]:
        """(top-1, cross entropy) on the test images."""
        if (name := digits(assignment)) not in self.top1:
            counts = count(*self.deployed(assignment), self.validation, 0, len(self.validation)).accuracy()
            self.top1[name] = counts.top1 or 0.0, counts.loss
        return self.top1[name]

    def measured(
        self, positions: NDArray[np.int64], names: Sequence[str], known: Measured | None
    ) -> tuple[Measured, dict[str, float]]:
        """The sums that estimators read of a sensitivity set, of its first blocks where they are `known`, and the seconds of each
        kind."""
        images, size = self.pool[positions], len(positions)
        blocks = blocks_of(size)
        kinds = estimators.kinds_of(names)
        if known is not None and not set(kinds) <= set(known.sums):
            known = None
        begin = 0 if known is None else len(known.counts)
        bench = Workbench(self.prepared, "kl_to_float", blocks, lambda a, b: (images[a:b], None))
        plan = Plan(self.space, blocks, kinds, rows_per_tile(self.prepared.network, self.space, bench.batching, None))
        tiles: dict[str, list[Any]] = {kind: [] for kind in kinds}
        seconds: dict[str, float] = dict.fromkeys(kinds, 0.0)
        for tile in sorted(plan.tiles, key=lambda tile: tile.sample_block):
            if tile.sample_block >= begin:
                start = time.perf_counter()
                tiles[tile.kind].append(measure_tile(bench, tile))
                seconds[tile.kind] += time.perf_counter() - start
        sums = {k: np.concatenate(parts).reshape(-1, *tile_kind(k).shape(plan.space)) for k, parts in tiles.items()}
        if known is not None:
            sums = {kind: np.concatenate([known.sums[kind], part]) for kind, part in sums.items()}
        counts = np.array([stop - start for start, stop in blocks])
        return Measured(self.space, "kl_to_float", counts, sums), seconds

    def cell(self, measured: Measured, positions: NDArray[np.int64], methods: Collection[str]) -> dict[str, Any]:
        """The answer of each needed method to every budget, and its accuracy."""
        size, names = len(positions), estimators_of(methods, len(positions))
        images = self.pool[positions]
        bench = Workbench(self.prepared, "kl_to_float", ((0, size),), lambda a, b: (images[a:b], None))
        matrices = {name: estimators.estimate(name, measured) for name in names}
        budgets = budgets_of(average_bits=self.budgets)

        def solver(program: Program) -> Solve:
            return solvers.prepare(program, "scip", time_limit=10)

        proposals = propose(matrices, budgets, solver)
        variants = propose_variants(matrices, budgets, solver) if {"chosen_full", "pairwise_raw"} & set(methods) else []
        known: dict[Assignment, tuple[float, Score]] = {}

        def measure(assignments: Iterable[Assignment]) -> dict[Assignment, tuple[float, Score]]:
            measured = {}
            for assignment in assignments:
                if assignment not in known:
                    each = score_passes(bench.criterion, *self.deployed(assignment), bench.passes(0))
                    known[assignment] = float(each.losses.mean()), Score(each.briers, each.hits)
                measured[assignment] = known[assignment]
            return measured

        plan = Plan(self.space, blocks_of(size), ("pairs",), self.space.num_options)
        spent = {name: list(cost) for name, cost in estimators.costs(names, plan).items()}
        answers: dict[tuple[str, float], tuple[Assignment, float | None]] = {}
        thrifty = [p for p in proposals if p.method in (UNIFORM, *THRIFTY)]
        tempered = [p for p in proposals if p.method in TEMPERED]
        for name, estimator, by_loss in (
            ("chosen", thrifty + tempered, False),
            ("chosen_least", thrifty, True),
            ("chosen_full", proposals + variants, False),
        ):
            if name not in methods:
                continue
            usable = {k: m for k, m in matrices.items() if any(p.method == k for p in estimator)}
            rows, evaluations = self._chosen(usable, budgets, estimator, measure, by_loss)
            answers |= {(name, bound): (assignment, None) for bound, assignment in rows.items()}
            kinds_once = replace(plan, kinds=estimators.kinds_of(usable)).tiles  # what two estimators read is measured once
            spent[name] = [plan.forward_images(kinds_once) + size * evaluations, plan.backward_images(kinds_once)]
        for proposal in [*proposals, *(v for v in variants if v.method == "pairwise_raw")]:
            answers[proposal.method, proposal.budget.bound] = proposal.assignment, proposal.loss_predicted
        return {
            "forward_images": {name: forward for name, (forward, _) in spent.items() if name in methods},
            "backward_images": {name: backward for name, (_, backward) in spent.items() if backward and name in methods},
            "rows": [
                [
                    method,
                    bound,
                    digits(assignment),
                    *_rounded((*self.evaluated(assignment), measure([assignment])[assignment][0], predicted)),
                ]
                for (method, bound), (assignment, predicted) in answers.items()
                if method in methods
            ],
        }

    def _chosen(
        self,
        matrices: Mapping[str, InteractionMatrix],
        budgets: Sequence[Budget],
        proposals: Sequence[Proposal],
        measure: Callable[[Iterable[Assignment]], dict[Assignment, tuple[float, Score]]],
        by_loss: bool,
    ) -> tuple[dict[float, Assignment], int]:
        """(budget -> of all assignments measured after a local search what `choose` takes, how many were measured for that)."""

        def losses(assignments: Iterable[Assignment]) -> dict[Assignment, float]:
            return {assignment: loss for assignment, (loss, _) in measure(assignments).items()}

        loss_of = losses(dict.fromkeys(p.assignment for p in proposals))
        matrix = matrices[surrogate(matrices, loss_of)]
        programs = {b: program_of(matrix, [b.limit(self.space)]) for b in budgets}
        searched = local_search({b: search(p, loss_of, SEARCH_EVALUATIONS, SEARCH_BATCH) for b, p in programs.items()}, losses)
        everything = [*proposals, *(Proposal(b, LOCAL_SEARCH, a, reported=False) for b, s in searched.items() for a in s.tried)]
        measured = measure(dict.fromkeys(p.assignment for p in everything))
        judged = None if by_loss else {assignment: score for assignment, (_, score) in measured.items()}
        results = choose(self.space, everything, losses(measured), scores=judged)
        chosen = {r.budget: r.assignment for r in results if r.method == CHOSEN}
        return {b.bound: chosen[b.name] for b in budgets}, len(measured)


def blocks_of(size: int) -> tuple[tuple[int, int], ...]:
    """Sample blocks of a sensitivity set: those of a smaller set are its first ones."""
    blocks: tuple[tuple[int, int], ...] = ()
    for reached in [s for s in sorted(BLOCKS) if s <= size]:
        last = blocks[-1][1] if blocks else 0
        blocks += tuple((last + a, last + b) for a, b in sample_blocks(reached - last, BLOCKS[reached] - len(blocks)))
    return blocks


def methods_of(size: int) -> tuple[str, ...]:
    """The methods of a cell with this number of images."""
    return ("chosen", "chosen_least", "chosen_full", "uniform", *estimators_of(("chosen_full",), size), "pairwise_raw")


def estimators_of(methods: Iterable[str], size: int) -> list[str]:
    """The estimators that methods read, among those that are measured on this number of images."""
    read = {name for method in methods for name in READS.get(method, (method,))}
    return [name for name in ESTIMATORS if name in read and size <= UP_TO.get(name, size)]


def digits(assignment: Assignment) -> str:
    """Bits of the layers, one digit each."""
    return "".join(str(bits) for bits in assignment.bits)


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None or not np.isfinite(value) else round(value, 6) for value in values]


# -- measuring -------------------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """Networks × spaces × settings of the study, plain ones first: that is where methods differ."""
    return [(n, s, c) for c in SETTINGS for s in SPACES for n in ONLY.get(s, NETWORKS)]


def cells(
    study: Study,
    sets: Mapping[tuple[int, int], NDArray[np.int64]],
    done: Mapping[tuple[Any, ...], Collection[str]],
    only: Collection[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields what the cells of a case lack: small sets of every draw first; `done` are methods by cell, `only` the methods of
    interest (all)."""
    smaller = sorted(size for size in {size for size, _ in sets} if size < max(SIZES))
    groups = [[(size, draw) for size in smaller if (size, draw) in sets] for draw in sorted({draw for _, draw in sets})]
    groups += [[(size, draw)] for size, draw in sorted(sets) if size >= max(SIZES)]
    for group in groups:
        measured = None
        for size, draw in group:
            done_methods = done.get((*study.case, size, draw), ())
            methods = [method for method in methods_of(size) if method not in done_methods and (only is None or method in only)]
            if not methods:
                continue
            begin = time.perf_counter()
            measured, seconds = study.measured(sets[size, draw], estimators_of(methods, size), measured)
            cell = study.cell(measured, sets[size, draw], methods)
            yield {
                **dict(zip(("network", "space", "setting", "images", "draw"), (*study.case, size, draw), strict=True)),
                "device": torch.cuda.get_device_name() if study.device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "seconds": round(time.perf_counter() - begin, 2),
                "measuring": {kind: round(spent, 2) for kind, spent in seconds.items()},
                **cell,
            }


@dataclass(frozen=True)
class Job:
    """Cells of one case that a process measures: the first draws of some sizes, appended to `path` as soon as they are known."""

    case: Case
    sizes: Collection[int]
    num_draws: int
    folder: Path
    path: Path
    until: float
    only: Collection[str] | None


def work(job: Job) -> None:
    """Measures what a job's cells lack."""
    torch.set_num_threads(1)
    pool = images_not_trained_on(job.folder)
    sets = {(n, d): positions for (n, d), positions in draws(len(pool)).items() if n in job.sizes and d < job.num_draws}
    known = rows(job.path)
    study = Study(job.case, pool, top1=evaluations(known, job.case))
    for row in cells(study, sets, {key(row): methods(row) for row in known}, job.only):
        with job.path.open("a") as file:  # one short line at a time: appended whole
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(*key(row), f"{row['seconds']:.0f} s", flush=True)
        if time.time() > job.until:
            return


def evaluations(cells: Iterable[Mapping[str, Any]], case: Case) -> dict[str, tuple[float, float]]:
    """Bits of the layers -> (top-1, cross entropy) on the test images, of a case's assignments so far."""
    return {
        bits: (top1, np.inf if loss is None else loss)
        for cell in cells
        if key(cell)[:3] == case
        for _, _, bits, top1, loss, *_ in cell["rows"]
    }


# -- records ---------------------------------------------------------------------------------------------------------------------


def record(cells: Iterable[Mapping[str, Any]], uri: str) -> int:
    """Records each cell that the experiment `clado-study` lacks as a run. Returns how many were new.
    A run has the settings of the cell, and a metric of each method with a step for each budget (in hundredths of a bit)."""
    set_environment()
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    existing = client.get_experiment_by_name(EXPERIMENT)
    experiment = existing.experiment_id if existing else client.create_experiment(EXPERIMENT)
    known, token = set(), None
    while True:
        runs = client.search_runs([experiment], "attributes.status = 'FINISHED'", max_results=1000, page_token=token)
        known |= {run.data.tags.get("clado.cell") for run in runs}
        if not (token := runs.token):
            break
    new = 0
    for cell in cells:
        later = "" if "uniform" in methods(cell) else f" ({', '.join(sorted(methods(cell)))})"  # methods that came later
        name = " ".join(map(str, key(cell))) + later
        if name in known:
            continue
        run = client.create_run(experiment, run_name=name, tags={"clado.cell": name}).info.run_id
        now = int(1000 * time.time())
        metrics = [
            Metric(f"{method}.{what}", value, now, round(100 * bound))
            for method, bound, _, *values in cell["rows"]
            for what, value in zip(("top1", "loss", "loss_sensitivity", "loss_predicted"), values, strict=True)
            if value is not None
        ]
        metrics += [Metric(f"{m}.forward_images", n, now, 0) for m, n in cell["forward_images"].items()]
        metrics += [Metric(f"{m}.backward_images", n, now, 0) for m, n in cell["backward_images"].items()]
        settings = {k: cell[k] for k in ("network", "space", "setting", "images", "draw", "device", "torch", "seconds")}
        client.log_batch(run, params=[Param(k, str(v)) for k, v in settings.items()])
        for first in range(0, len(metrics), 900):
            client.log_batch(run, metrics=metrics[first : first + 900])
        client.set_terminated(run)
        new += 1
    return new


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "record"))
    parser.add_argument("--uri", help="of MLflow; default: SQLite in runs/study")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="Fashion-MNIST's idx files")
    parser.add_argument("--file", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--images", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="sizes of sensitivity sets")
    parser.add_argument("--draws", type=int, default=max(SIZES.values()), help="the first ones of each size")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES), help="candidate bits")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=methods_of(0), help="which alone; default: all")
    parser.add_argument("--minutes", type=float, default=1e6, help="starts no cell later than this")
    options = parser.parse_args()
    if options.what == "record":
        Path("runs/study").mkdir(parents=True, exist_ok=True)
        uri = options.uri or "sqlite:///runs/study/mlflow.db"
        print(f"{record(lines(options.file), uri)} new runs in {uri}, experiment {EXPERIMENT}")
        return
    until = time.time() + 60 * options.minutes
    jobs = [
        Job(case, options.images, options.draws, options.data, options.file, until, options.methods)
        for case in cases()
        if case[0] in options.networks and case[1] in options.spaces and case[2] in options.settings
    ]
    # as the workers of a run
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs_of = {pool.submit(work, job): job.case for job in jobs}
        wrong = [f"{case}: {error}" for running, case in jobs_of.items() if (error := running.exception()) is not None]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
