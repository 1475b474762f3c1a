"""Seconds to proven optimality on synthetic matrices with real layer sizes and on measured ones; writes SOLVER.md.

    python -m tests.benchmarks.bench_solver                 # everything, about an hour on one core
    python -m tests.benchmarks.bench_solver resnet20x3      # one instance
    python -m tests.benchmarks.bench_solver fronts          # 25 budgets at once
    python -m tests.benchmarks.bench_solver naive           # the naive formulation, on what is solved so far

Each solve is appended to `solver.jsonl` at once, and one that is there is not repeated: stop and go on as you like. Delete the
file to measure anew.
"""

import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clado.choosing import constraints, pareto, solvers
from clado.choosing.program import Convexity, Program
from tests.benchmarks.pages import filled
from tests.benchmarks.solver_instances import FAMILIES, MEASURED_ESTIMATORS, MEASURED_NETWORKS, instance, measured

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "solver.jsonl", HERE / "SOLVER.md"
# Name: network, bit-widths, seconds allowed, what the goal says.
INSTANCES: dict[str, tuple[str, tuple[int, ...], float, str]] = {
    "resnet20x3": ("resnet20", (2, 4, 8), 30.0, "1 s"),
    "resnet50x3": ("resnet50", (2, 4, 8), 30.0, "3 s"),
    "mobilenet_v3_large_x3": ("mobilenet_v3_large", (2, 4, 8), 30.0, "10 s"),
    "vit_b_16_x4": ("vit_b_16", (2, 3, 4, 8), 30.0, "10 s"),
    "resnet101x3": ("resnet101", (2, 4, 8), 30.0, "15 s"),
    "resnet152x3": ("resnet152", (2, 4, 8), 120.0, "gap 0.5 % at 30 s, 0.1 % at 120 s"),
    "mobilenet_v3_large_x5": ("mobilenet_v3_large", (2, 3, 4, 6, 8), 120.0, "gap 0.5 % at 30 s, 0.1 % at 120 s"),
}
GOALS = [family for family in FAMILIES if family != "lowrank"]
LOWRANK_SECONDS, LOWRANK_SEEDS = 10.0, (0,)  # without a goal: many are out of reach
AGAIN = 2  # more solves of a program that took less than a second
FIRST_LOOK = 30.0  # seconds; a program still open then shows its gap, and is solved anew with all that is allowed
SEEDS, BUDGETS = (0, 1, 2), (3.0, 4.0, 5.0)
MEASURED_BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
CONVEXITIES: tuple[Convexity, ...] = ("clip_psd", "raw")
NUM_BUDGETS = 25
NAIVE_SECONDS, NAIVE_TIMES = (2.0, 300.0), 20.5  # least and most; as a multiple of ours

Key = tuple[str, str, str, int, float]
"""Instance, family (or estimator), convexity, seed, average bits."""


def cases() -> Iterator[Key]:
    """What has a goal comes first."""
    yield from itertools.product(INSTANCES, GOALS, CONVEXITIES, SEEDS, BUDGETS)
    yield from itertools.product(MEASURED_NETWORKS, MEASURED_ESTIMATORS, CONVEXITIES, (0,), MEASURED_BUDGETS)
    yield from itertools.product(INSTANCES, ("lowrank",), CONVEXITIES, LOWRANK_SEEDS, BUDGETS)


def program_of(key: Key) -> Program:
    name, family, convexity, seed, budget = key
    if name in INSTANCES:
        network, bits, _, _ = INSTANCES[name]
        matrix = instance(network, bits, family, seed)
    else:
        matrix = measured(name, family)
    limit = constraints.constraint("average_bits", matrix.space, budget)
    return Program.build(matrix, [limit], convexity=convexity)  # type: ignore[arg-type]


def measure(key: Key) -> dict[str, Any]:
    """Seconds, nodes and gap of a solve; `gap_30` where it was open after the first look."""
    program = program_of(key)
    allowed = LOWRANK_SECONDS if key[1] == "lowrank" else INSTANCES[key[0]][2] if key[0] in INSTANCES else FIRST_LOOK
    begin = time.process_time()
    solution = solvers.solve(program, time_limit=min(allowed, FIRST_LOOK))
    more: dict[str, Any] = {}
    if solution.gap > 2e-6 and allowed > FIRST_LOOK:
        more, begin = {"gap_30": solution.gap}, time.process_time()
        solution = solvers.solve(program, time_limit=allowed)
    cpu = time.process_time() - begin
    for _ in range(AGAIN if cpu < 1 else 0):  # imports and what else the machine does are the most of so short a time
        begin = time.process_time()
        again = solvers.solve(program, time_limit=allowed)
        cpu = min(cpu, time.process_time() - begin)
        solution = min(solution, again, key=lambda s: s.seconds)
    return {
        "key": list(key),
        "seconds": solution.seconds,
        "cpu": cpu,
        "gap": solution.gap,
        "nodes": solution.nodes,
        "status": str(solution.status),
        "objective": solution.objective,
        **more,
    }


def front(family: str, convexity: Convexity) -> dict[str, Any]:
    """A whole front of a ResNet-50-sized matrix, as `clado sweep` solves it: shared convexification, each answer a start."""
    matrix = instance("resnet50", (2, 4, 8), family, 0)
    program = Program.build(matrix, [constraints.constraint("average_bits", matrix.space, 8.0)], convexity=convexity)
    bounds = np.floor(np.linspace(*program.reachable(0), NUM_BUDGETS)).tolist()
    begin, cpu = time.perf_counter(), time.process_time()
    points = pareto.sweep(program, "average_bits", bounds, solvers.prepare(program))
    return {
        "front": [family, convexity],
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "optimal": sum(point.solution.status == "optimal" for point in points),
        "points": len(points),
    }


def naive_seconds(program: Program, limit: float) -> tuple[float, bool]:
    """SCIP's defaults on t ≥ ½xᵀQx in one quadratic constraint: CPU seconds (building not counted), and whether it finished."""
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    x = [model.addVar(vtype="B") for _ in range(program.num_choices)]
    for first, last in zip(program.starts[:-1], program.starts[1:], strict=True):
        model.addCons(quicksum(x[first:last]) == 1)
    for costs, bound in zip(program.costs, program.limits, strict=True):
        model.addCons(quicksum(float(c) * v for c, v in zip(costs, x, strict=True)) <= float(bound))
    t = model.addVar(lb=None)
    scale = 100 / np.abs(program.quadratic).max()
    rows, columns = np.nonzero(np.triu(program.quadratic))
    half = np.where(rows == columns, 0.5, 1.0) * program.quadratic[rows, columns] * scale
    model.addCons(quicksum(float(q) * x[r] * x[c] for q, r, c in zip(half, rows, columns, strict=True)) <= t)
    model.setObjective(t)
    model.setParam("timing/clocktype", 1)  # CPU seconds, which other work on the machine does not change
    model.setParam("limits/time", limit)
    model.setParam("limits/gap", 1e-6)
    begin = time.process_time()
    model.optimize()
    return time.process_time() - begin, model.getStatus() in {"optimal", "gaplimit"}


def naive(key: Key, ours: float) -> dict[str, Any]:
    """The naive formulation, given as much more time as ours is to be faster, and a little."""
    limit = float(np.clip(NAIVE_TIMES * ours, *NAIVE_SECONDS))
    seconds, finished = naive_seconds(program_of(key), limit)
    if finished and seconds < 1:  # the shortest of as many as ours
        seconds = min([seconds, *(naive_seconds(program_of(key), limit)[0] for _ in range(AGAIN))])
    return {"naive": list(key), "seconds": seconds, "finished": finished}


def is_compared(key: Key) -> bool:
    """Seed 0 at 4 bits, where there is a goal."""
    return key[0] in INSTANCES and key[1] in GOALS and key[3:] == (0, 4.0)


def kept(kind: str) -> dict[Any, dict[str, Any]]:
    """Lines of a kind so far: `key`, `front` or `naive`."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {tuple(line[kind]): line for line in lines if kind in line}


def table() -> str:
    """SOLVER.md."""
    records, compared = kept("key"), kept("naive")
    lines = [
        "# Seconds to proven optimality",
        "",
        f"Machine: {processor()}, one core of {os.cpu_count()}; Python {platform.python_version()}.",
        "Command: `python -m tests.benchmarks.bench_solver`. Relative tolerance 1e-6; start, convexification and proof included.",
        "",
        "Each cell is the worst of its programs. It has seconds (CPU seconds; nodes), or the gap left at the time limit.",
        "",
        "## Synthetic matrices",
        "",
        "Layer sizes are real, and the structure is that of `solver_instances.py`. Three seeds, budgets of 3, 4 and 5 average",
        "bits. The family lowrank has no goal and one seed. Naive is SCIP with a quadratic epigraph on the same program (seed 0,",
        "4 bits). Its column says how many times longer it took, in CPU seconds, with > if it was stopped unfinished.",
        "",
        "| instance | goal | matrix | weak | medium | strong | lowrank | naive (weak, medium, strong) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, _, _, goal) in INSTANCES.items():
        for convexity in CONVEXITIES:
            cells, ratios = [], []
            for family in FAMILIES:
                of_family = {k: r for k, r in records.items() if k[:3] == (name, family, convexity)}
                cells.append(cell(list(of_family.values())))
                ratios += [ratio(compared[k], r["cpu"]) for k, r in of_family.items() if k in compared]
            if any(cells):
                lines.append(f"| {name} | {goal} | {convexity} | {' | '.join(cells)} | {', '.join(ratios)} |")
    lines += [
        "",
        "## Measured matrices",
        "",
        "The zoo's networks as `clado run` measures them (`measured_matrices.py`), budgets of "
        f"{', '.join(f'{bits:g}' for bits in MEASURED_BUDGETS)} average bits.",
        "",
        "| network | matrix | " + " | ".join(MEASURED_ESTIMATORS) + " |",
        "|---|---|---|---|",
    ]
    for name, convexity in itertools.product(MEASURED_NETWORKS, CONVEXITIES):
        cells = [cell([r for k, r in records.items() if k[:3] == (name, e, convexity)]) for e in MEASURED_ESTIMATORS]
        lines.append(f"| {name} | {convexity} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Fronts",
        "",
        f"{NUM_BUDGETS} budgets from 2 to 8 average bits on ResNet-50-sized synthetic matrices, seed 0: CPU seconds for all,",
        "and how many are proven. Goal: 60 s.",
        "",
        "| matrix | " + " | ".join(GOALS) + " |",
        "|---|" + "---|" * len(GOALS),
    ]
    fronts = kept("front")
    for convexity in CONVEXITIES:
        cells = [front_cell(fronts.get((family, convexity))) for family in GOALS]
        lines.append(f"| {convexity} | {' | '.join(cells)} |")
    return filled("\n".join(lines) + "\n")


def front_cell(record: dict[str, Any] | None) -> str:
    """One front."""
    if record is None:
        return ""
    return f"{record['cpu']:.1f}; {record['optimal']} of {record['points']}"


def cell(solves: list[dict[str, Any]]) -> str:
    """The worst of several solves."""
    if not solves:
        return ""
    late = max((r["gap_30"] for r in solves if "gap_30" in r), default=None)
    at_30 = "" if late is None else f"; gap {100 * late:.2g} % at 30 s"
    open_ones = [r for r in solves if r["status"] != "optimal"]
    if open_ones:
        widest = max(open_ones, key=lambda r: r["gap"])
        return (
            f"{len(open_ones)} of {len(solves)} open, gap up to {100 * widest['gap']:.2g} % at {widest['seconds']:.0f} s{at_30}"
        )
    slowest = max(solves, key=lambda r: r["seconds"])
    return f"{slowest['seconds']:.2f} ({slowest['cpu']:.2f}; {slowest['nodes']}{at_30})"


def ratio(record: dict[str, Any], ours: float) -> str:
    """How many times longer the naive formulation took."""
    return f"{'' if record['finished'] else '>'}{record['seconds'] / ours:.0f}×"


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def note(record: dict[str, Any]) -> None:
    """Keeps a line, and the table up to date."""
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
    TABLE.write_text(table())


def main(names: list[str]) -> None:
    """Solves what is wanted and not kept yet, then the naive formulation."""
    known = kept("key")
    for key in cases():
        if key not in known and (not names or key[0] in names):
            note(measure(key))
    fronts = kept("front")
    for family, convexity in itertools.product(GOALS, CONVEXITIES):
        if (family, convexity) not in fronts and (not names or "fronts" in names):
            note(front(family, convexity))
    compared = kept("naive")
    for key, record in kept("key").items():
        if is_compared(key) and key not in compared and (not names or key[0] in names or "naive" in names):
            note(naive(key, record["cpu"]))
    TABLE.write_text(table())


if __name__ == "__main__":
    main(sys.argv[1:])
