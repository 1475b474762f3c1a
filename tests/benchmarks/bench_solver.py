"""Seconds to proven optimality on synthetic matrices with real layer sizes, beside the naive formulation; writes SOLVER.md.

    python -m tests.benchmarks.bench_solver                 # everything, about 40 minutes on one core
    python -m tests.benchmarks.bench_solver resnet20x3      # one instance

Each solve is appended to `solver.jsonl` at once, and one that is there is not repeated: stop and go on as you like. Delete the
file to measure anew. The table shows the worst of three seeds and of budgets of 3, 4 and 5 average bits.
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

from clado import constraints, solvers
from clado.program import Convexity, Program
from tests.benchmarks.solver_instances import FAMILIES, instance

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
LOWRANK_SECONDS, LOWRANK_SEEDS = 10.0, (0,)  # without a goal: many are out of reach
SEEDS, BUDGETS = (0, 1, 2), (3.0, 4.0, 5.0)
CONVEXITIES: tuple[Convexity, ...] = ("clip_psd", "raw")
NAIVE_SECONDS, NAIVE_TIMES = (2.0, 30.0), 21  # least and most; as a multiple of ours

Key = tuple[str, str, str, int, float]


def cases() -> Iterator[Key]:
    """Families with a goal first."""
    for with_goal in (True, False):
        families = [family for family in FAMILIES if (family != "lowrank") == with_goal]
        seeds = SEEDS if with_goal else LOWRANK_SEEDS
        yield from itertools.product(INSTANCES, families, CONVEXITIES, seeds, BUDGETS)


def program_of(key: Key) -> Program:
    name, family, convexity, seed, budget = key
    network, bits, _, _ = INSTANCES[name]
    matrix = instance(network, bits, family, seed)
    limit = constraints.constraint("average_bits", matrix.space, budget)
    return Program.build(matrix, [limit], convexity=convexity)  # type: ignore[arg-type]


def naive_seconds(program: Program, limit: float) -> tuple[float, bool]:
    """SCIP's defaults on t ≥ ½xᵀQx in one quadratic constraint: seconds (building not counted), and whether it finished."""
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
    model.setParam("limits/time", limit)
    model.setParam("limits/gap", 1e-6)
    begin = time.perf_counter()
    model.optimize()
    return time.perf_counter() - begin, model.getStatus() in {"optimal", "gaplimit"}


def measure(key: Key) -> dict[str, Any]:
    name, family, _, seed, budget = key
    program = program_of(key)
    allowed = LOWRANK_SECONDS if family == "lowrank" else INSTANCES[name][2]
    begin = time.process_time()
    solution = solvers.solve(program, time_limit=allowed)
    record: dict[str, Any] = {"key": list(key), "seconds": solution.seconds, "cpu": time.process_time() - begin}
    record |= {"gap": solution.gap, "nodes": solution.nodes, "status": str(solution.status), "objective": solution.objective}
    if seed == 0 and budget == 4.0 and family != "lowrank" and program.num_choices <= 200:
        record["naive"] = naive_seconds(program, float(np.clip(NAIVE_TIMES * solution.seconds, *NAIVE_SECONDS)))
    return record


def done() -> dict[Key, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {tuple(record["key"]): record for record in records}


def table(records: dict[Key, dict[str, Any]]) -> str:
    lines = [
        "# Seconds to proven optimality",
        "",
        f"Machine: {processor()}, one core of {os.cpu_count()}, shared with other work; Python {platform.python_version()}.",
        "Command: `python -m tests.benchmarks.bench_solver`. Synthetic matrices, see `solver_instances.py`; relative",
        "tolerance 1e-6; start, convexification and proof included. Each cell is the worst of three seeds and of budgets of 3, 4",
        "and 5 average bits: seconds (CPU seconds; nodes), or the gap left at the time limit. lowrank has no goal and one seed.",
        "'naive' is SCIP with a quadratic epigraph on the same program (seed 0, 4 bits; up to 200 binaries): how many",
        "times longer it took, '>' when it was stopped unfinished.",
        "",
        "| instance | goal | matrix | weak | medium | strong | lowrank | naive (weak, medium, strong) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, _, _, goal) in INSTANCES.items():
        for convexity in CONVEXITIES:
            cells, naive = [], []
            for family in FAMILIES:
                found = [r for k, r in records.items() if k[:3] == (name, family, convexity)]
                cells.append(cell(found))
                naive += [ratio(r) for r in found if "naive" in r]
            if any(cells):
                lines.append(f"| {name} | {goal} | {convexity} | {' | '.join(cells)} | {', '.join(naive)} |")
    return "\n".join(lines) + "\n"


def cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    open_ones = [r for r in found if r["status"] != "optimal"]
    slowest = max(found, key=lambda r: r["seconds"])
    proven = f"{slowest['seconds']:.2f} ({slowest['cpu']:.2f}; {slowest['nodes']})"
    if not open_ones:
        return proven
    widest = max(open_ones, key=lambda r: r["gap"])
    return f"{len(open_ones)} of {len(found)} open, gap up to {100 * widest['gap']:.2g} % at {widest['seconds']:.0f} s"


def ratio(record: dict[str, Any]) -> str:
    seconds, finished = record["naive"]
    return f"{'' if finished else '>'}{seconds / record['seconds']:.0f}×"


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(wanted: list[str]) -> None:
    records = done()
    for key in cases():
        if key in records or (wanted and key[0] not in wanted):
            continue
        record = measure(key)
        records[key] = record
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            *key, record["status"], f"{record['seconds']:.2f} s", f"gap {record['gap']:.2g}", record.get("naive", ""), flush=True
        )
        TABLE.write_text(table(records))
    TABLE.write_text(table(records))


if __name__ == "__main__":
    main(sys.argv[1:])
