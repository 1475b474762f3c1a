"""Reference figures on ImageNet, and a run beside them.

Given to this project to aim at; it has not measured them itself, nor checked them against a paper. torchvision's V1 weights,
activations at 8 bits per tensor, weights per tensor, symmetric, ranges of least squared error, batch norm not folded, all 50,000
validation images.
"""

from dataclasses import dataclass

from clado.errors import StoreError
from clado.records import CHOSEN, Accuracy, Result, RunRecord, markdown_table, percent

MIB = 2**20
SAME_SIZE = 0.02  # sizes that differ by no more, relatively, are compared


@dataclass(frozen=True)
class Reference:
    """One network at one setting; `bits`: of uniform weights, None where mixed or float; `mebibytes`: of the searched layers."""

    network: str
    setting: str
    top1: float
    loss: float
    bits: int | None = None
    mebibytes: float | None = None


REFERENCES = (
    Reference("resnet50", "float", 0.7615, 0.9616),
    Reference("resnet50", "W8A8", 0.7578, 0.9645, 8, 22.359),
    Reference("resnet50", "W4A8", 0.4543, 2.5618, 4, 11.180),
    Reference("resnet50", "W2A8", 0.0010, 6.9102, 2, 5.590),
    Reference("resnet18", "W8A8", 0.6947, 1.2566, 8, 10.641),
    Reference("resnet18", "W4A8", 0.4627, 2.4289, 4, 5.320),
    Reference("resnet18", "W2A8", 0.0012, 7.0920, 2, 2.660),
    Reference("resnet18", "mixed, first and last float", 0.6948, 1.2558, mebibytes=10.641),
    Reference("resnet18", "mixed, first and last float", 0.6800, 1.3118, mebibytes=7.828),
    Reference("resnet18", "mixed, first and last float", 0.6756, 1.3294, mebibytes=7.266),
    Reference("resnet18", "mixed, first and last float", 0.6727, 1.3446, mebibytes=6.984),
)


def comparison(record: RunRecord) -> str:
    """The reference rows of the record's network, each with the run's own answer of that setting or size, as a table.

    StoreError where there is none.
    """
    name = record.network.split(" ")[0].rpartition(":")[2]
    rows = [row for row in REFERENCES if row.network == name]
    if not rows:
        known = ", ".join(dict.fromkeys(row.network for row in REFERENCES))
        raise StoreError(
            f"there are no reference figures of {name}; expected a run of one of {known}, such as recipes/imagenet holds"
        )
    table = []
    for row in rows:
        ours, how = _ours(record, row)
        size = "–" if row.mebibytes is None else f"{row.mebibytes:.3f}"
        cells = [row.setting, size, percent(row.top1), f"{row.loss:.4f}"]
        if ours is None or ours.top1 is None:
            table.append([*cells, how, "–", "–", "–"])
        else:
            table.append([*cells, how, percent(ours.top1), f"{ours.loss:.4f}", f"{100 * (ours.top1 - row.top1):+.2f}"])
    header = ["reference", "MiB", "top-1 %", "loss", "this run", f"{record.top1_name} %", "validation loss", "points"]
    counted = f"This run: {record.network}, on {record.float_accuracy.num_images:,} images; corrections: {record.corrections}."
    warning = (
        "\nFewer images than ImageNet's 50,000, or not ImageNet's: the difference says nothing about the method."
        if record.top1_name != "top1" or not record.imagenet
        else ""
    )
    source = "Reference: given, not measured here; torchvision V1 weights, weights and activations per tensor, 50,000 images."
    return f"{markdown_table(header, table)}\n{counted}{warning}\n{source}"


def _ours(record: RunRecord, row: Reference) -> tuple[Accuracy | None, str]:
    """The run's accuracy at the setting of a reference row, and what it is called."""
    if row.setting == "float":
        return record.float_accuracy, "float"
    if row.bits is not None:
        found = [result for result in record.results if set(result.assignment.bits) == {row.bits}]
    else:
        wanted = (row.mebibytes or 0) * MIB
        found = [
            result
            for result in record.results
            if result.method == CHOSEN and abs(result.size_bytes - wanted) <= SAME_SIZE * wanted
        ]
    best: Result | None = min(found, key=lambda result: result.loss_shipped, default=None)
    if best is None:
        return None, "–"
    return best.validation, f"{best.method} at {best.budget}, {best.size_bytes / MIB:.3f} MiB"
