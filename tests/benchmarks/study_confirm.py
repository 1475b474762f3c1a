"""The study's plain answers on images that no rule was picked on.

    python -m tests.benchmarks.study_confirm --data FOLDER [--jobs 2]

The rule of `chosen` was picked by top-1 on the test images (docs/lab-log.md), so what it gains there is flattered. 1,208 of the
pool's images are in no sensitivity set, and no other figure of the study is of them (890 chose the networks' checkpoints).
Every plain answer to the budgets of 2.25 to 3.5 bits is evaluated on them once. Each case is a line of
study_confirmation.jsonl, appended as soon as it is known. STUDY.md compares by them.
"""

import argparse
import json
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clado.data.images import MemorySlice
from clado.data.sources.zoo import normalise
from clado.data.zoo.train import read_fashion_mnist
from clado.evaluation import count
from clado.space import Assignment, SearchSpace
from tests.benchmarks.study import SPACES, Case, Study, cases, draws, pool_indices
from tests.benchmarks.study_table import CONFIRMATION, LOW, key, rows


def left_over() -> NDArray[np.int64]:
    """Indices into the 60,000 training images, ascending, of the pool's images that are in no set."""
    pool = pool_indices()
    return np.delete(pool, np.unique(np.concatenate(list(draws(len(pool)).values()))))


def answers(cells: Iterable[Mapping[str, Any]], case: Case) -> list[str]:
    """Bits of the layers of every distinct answer to the budgets of LOW."""
    return sorted({bits for cell in cells if key(cell)[:3] == case for _, b, bits, *_ in cell["rows"] if b in LOW})


def assignment_of(bits: str, space: SearchSpace) -> Assignment:
    """The reverse of `study.digits`: activations have one width in the study."""
    return replace(space.narrowest, bits=tuple(map(int, bits)))


def confirm(case: Case, lacking: Iterable[str], folder: Path) -> dict[str, Any]:
    """A line: top-1 of a case's answers that are lacking on the images that are left over."""
    torch.set_num_threads(1)
    begin, where, data = time.perf_counter(), left_over(), read_fashion_mnist(folder)
    images = normalise(data["train_images"][where])
    unseen = MemorySlice(images, torch.from_numpy(data["train_labels"][where].astype(np.int64)), 10)
    study = Study(case, images)
    top1 = {}
    for bits in lacking:
        shipped = study.deployed(assignment_of(bits, study.space))
        top1[bits] = round(count(*shipped, unseen, 0, len(unseen)).accuracy().top1 or 0.0, 6)
    names = dict(zip(("network", "space", "setting"), case, strict=True))
    device = torch.cuda.get_device_name() if study.device.type == "cuda" else "cpu"
    about = {"images": len(unseen), "device": device, "torch": torch.__version__}
    return {**names, **about, "seconds": round(time.perf_counter() - begin, 1), "top1": top1}


def main() -> None:
    """Evaluates what the file lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="Fashion-MNIST's idx files")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES), help="candidate bits")
    options = parser.parse_args()
    lines = [json.loads(line) for line in CONFIRMATION.read_text().splitlines()] if CONFIRMATION.exists() else []
    done: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for line in lines:
        done[line["network"], line["space"], line["setting"]] |= set(line["top1"])
    cells = rows()
    missing = {c: set(answers(cells, c)) - done[c] for c in cases() if c[1] in options.spaces and c[2] == "plain"}
    lacking = {case: sorted(bits) for case, bits in missing.items() if bits}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for line in pool.map(confirm, lacking, lacking.values(), [options.data] * len(lacking)):
            with CONFIRMATION.open("a") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            print(line["network"], line["space"], len(line["top1"]), "answers", f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
