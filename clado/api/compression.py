"""From a float module to a quantized one in one call."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clado.api import budgets
from clado.api.budgets import TableBound
from clado.api.checks import checked_criterion, image_slice
from clado.api.progress import Advance, Progress, showing
from clado.api.steps import measured, prepare
from clado.api.validation import validate
from clado.choosing import solvers
from clado.choosing.choice import Score, choose
from clado.choosing.constraints import Constraint
from clado.choosing.program import Program, Solve
from clado.choosing.proposals import Proposal, check_budgets, propose
from clado.choosing.solution import assignment_rows
from clado.data.images import DataSlices, ImageSlice, PickedSlice, as_slice
from clado.errors import ConfigurationError, DataError
from clado.exporting._torch_module import as_module
from clado.exporting.packed import PackedSize, export_packed
from clado.grids import QuantizedLayer
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.plan import sample_blocks
from clado.measuring.scores import Scores, joined, score_passes
from clado.measuring.workbench import Workbench
from clado.network.arguments import check_model
from clado.network.network import Network, prefers_channels_last
from clado.quantization.preparation import Prepared
from clado.records.results import CHOSEN, Accuracy, Result
from clado.records.tabular import Tabular, html_table
from clado.records.text import size_text
from clado.space import Assignment, SearchSpace

CORRECTIONS = ("equalization", "gptq", "output_statistics")
"""Corrections that are tried. The chosen network may have fewer."""
LEAST_IMAGES = 32
"""Least number of images of each of the four sets. `output_statistics` needs this many for calibration."""
MOST_IMAGES = 256
"""Most images of a set by default. The validation set gets all others."""
BLOCK_IMAGES = 64
"""Images of one sample block of the selection images."""
SETS = ("calibration", "sensitivity", "selection", "validation")


@dataclass(frozen=True, repr=False, eq=False)
class Compressed(Tabular):
    """A quantized module, and what was measured of it. Accuracies are of images that no decision has used."""

    module: nn.Module
    """The quantized module, in eval mode, as `clado.quantize` returns it."""
    assignment: Assignment
    """A bit-width for each searched layer."""
    space: SearchSpace
    """The searched layers."""
    method: str
    """Who proposed the assignment: an estimator, or `uniform`."""
    loss_predicted: float | None
    """The criterion on the sensitivity images, as the method's matrix predicts it. None without a matrix, or if `method`
    predicts no loss."""
    loss_measured: float
    """The criterion of the module, on the validation images."""
    accuracy: Accuracy
    """Accuracy of the module on the validation images."""
    float_accuracy: Accuracy
    """Accuracy of the float module on the same images."""
    agreement: float | None
    """Fraction of the validation images with the same top class as from the float module. None without logits."""
    drop_interval: float | None
    """Half the 95 % interval of the difference on paired images: in the metric, or else in top-1. None without both."""
    num_images: Mapping[str, int]
    """Images of each set: calibration, sensitivity, selection, validation."""
    seed: int
    """Seed of the split."""
    matrices: Mapping[str, InteractionMatrix]
    """The interaction matrices by estimator."""
    results: tuple[Result, ...]
    """The measurements on the selection images: one row for each method, and one for the chosen answer."""
    deployed: tuple[Network, dict[int, QuantizedLayer]]
    """The deployed network and its layers, in the form that exports take."""

    @property
    def average_bits(self) -> float:
        """Bits per searched weight."""
        return self.space.average_bits(self.assignment)

    @property
    def size_bytes(self) -> int:
        """Bytes of the searched weights, with each tensor packed."""
        return self.space.size_bytes(self.assignment)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights as 32-bit floats."""
        return 4 * self.space.num_weights

    def summary(self) -> str:
        """Sizes and accuracies, in one line."""
        sizes = f"{size_text(self.float_bytes)} → {size_text(self.size_bytes)} ({self.average_bits:.3g} bits a weight)"
        images = f"{self.num_images['validation']:,} images"
        before, after = self.float_accuracy.metric, self.accuracy.metric
        if before is not None and after is not None:
            interval_text = "" if self.drop_interval is None else f" ± {self.drop_interval:.2g}"
            change = f"{before:.4g} → {after:.4g} ({after - before:+.2g}{interval_text}, {images})"
            return f"{sizes}, {self.accuracy.metric_name} {change}"
        if self.agreement is None:
            return f"{sizes}, loss {self.float_accuracy.loss:.3g} → {self.accuracy.loss:.3g} on {images}"
        before, after = self.float_accuracy.top1, self.accuracy.top1
        if before is None or after is None or self.drop_interval is None:
            same = f"same top class as the float network on {100 * self.agreement:.1f} % of {images}"
            return f"{sizes}, {same}, KL divergence {self.accuracy.loss:.3g}"
        points, interval = 100 * (after - before), 100 * self.drop_interval
        return f"{sizes}, top-1 {100 * before:.1f} → {100 * after:.1f} % ({points:+.1f} ± {interval:.1f} points, {images})"

    def rows(self) -> list[dict[str, Any]]:
        """Each layer: its bits, weights and bytes."""
        return assignment_rows(self.space, self.assignment)

    @property
    def _sets(self) -> str:
        return "images: " + ", ".join(f"{count:,} {name}" for name, count in self.num_images.items())

    def __str__(self) -> str:
        """The summary, and the sizes of the sets of images."""
        return f"{self.summary()}\n{self._sets}"

    def _repr_html_(self) -> str:
        return html_table(f"{self.summary()}; {self._sets}", self.rows())

    def save(self, path: str | Path) -> PackedSize:
        """Writes the module as a packed safetensors file, in which a weight takes as many bits as it was given.

        `clado.load_packed(path, float_module)` reads it.
        """
        return export_packed(Path(path), *self.deployed)


def compress(
    model: nn.Module | Network,
    data: Any,
    *,
    average_bits: float | None = None,
    size_bytes: float | None = None,
    percent_of_8_bit: float | None = None,
    bops: float | None = None,
    latency: TableBound | None = None,
    table: TableBound | None = None,
    bits: Sequence[int | str | None] = (2, 4, 8),
    activation_bits: Sequence[int] = (),
    fixed: Sequence[str] = (),
    estimator: str = "gauss_newton",
    criterion: Any = "kl_to_float",
    metric: Any = None,
    corrections: Sequence[str] = CORRECTIONS,
    calibration_images: int | None = None,
    sensitivity_images: int | None = None,
    selection_images: int | None = None,
    validation_images: int | None = None,
    seed: int = 0,
    solver: str = "scip",
    time_limit: float = 60.0,
    progress: Progress = False,
) -> Compressed:
    """Quantizes a module in one call: splits the data, corrects, measures, solves, chooses, evaluates.

    The images are split into four disjoint sets by `seed`. Ranges and corrections are fitted to
    calibration images. The interaction matrix is measured on sensitivity images. The estimator's
    answer, that of `layerwise`, and the widest uniform bits that fit, each with and without
    corrections, are compared on selection images. Accuracies are of validation images. Data are read
    into memory unless they are an `ImageSlice`.

    Args:
        model: A float module that `torch.export` accepts, or a `clado.Network`. It is not changed.
        data: Images as in `clado.measure`: a tensor, a pair (images, labels), or a DataLoader. Without
            labels, the criterion must not need labels (`kl_to_float` needs none).
        average_bits: Largest average of bits per searched weight.
        size_bytes: Largest size of the searched weights in bytes.
        percent_of_8_bit: The same in percent of 8 bits everywhere.
        bops: Most bit operations of one image.
        latency: Most seconds of one image, and a CSV file with the columns layer,bits,seconds.
        table: Largest sum of other costs, and a CSV file with the columns layer,bits,UNIT.
        bits: Candidate bit-widths of weights. "float" after them leaves a layer in float.
        activation_bits: Candidate bit-widths of the layers' inputs. If empty, inputs stay in float.
        fixed: Name patterns of layers that stay in float.
        estimator: A name of `clado.interaction.estimators`.
        criterion: The loss that must not grow, as in `clado.measure`.
        metric: A user-defined metric, as in `clado.evaluate`.
        corrections: Names of `clado.quantization.corrections`.
        calibration_images: Images of this set; by default a quarter of the data, 256 at most.
        sensitivity_images: The same for the sensitivity set.
        selection_images: The same for the selection set.
        validation_images: Images of this set; by default all others.
        seed: Seed of the split and of corrections that draw random numbers.
        solver: A name of `clado.choosing.solvers`.
        time_limit: Seconds that each solve may take.
        progress: True shows a bar for each of the phases preparing, measuring, choosing and
            evaluating. A callable is called with (done, total), which start again with each phase.

    Raises:
        DataError: There are too few images (the message says how many are needed), or they do not fit.
        InfeasibleError: No assignment keeps the limits.
        NetworkError: The module cannot be searched, or cannot hold what a correction gives it.
        ConfigurationError: There is no limit, or a setting is unknown.
    """
    keywords = {
        "average_bits": average_bits,
        "size_bytes": size_bytes,
        "percent_of_8_bit": percent_of_8_bit,
        "bops": bops,
        "latency": latency,
        "table": table,
    }
    row_budgets = budgets.budgets(keywords)
    if isinstance(model, Network) and fixed:
        raise ConfigurationError(
            "model is a clado.Network, which has its fixed layers already; expected clado.Network(..., fixed=...)"
        )
    images = as_slice(data, image_shape=model.image_shape if isinstance(model, Network) else None, classes=False)
    counts = (calibration_images, sensitivity_images, selection_images, validation_images)
    slices = split(images, counts, seed)
    network = model if isinstance(model, Network) else _network(model, slices.validation.load(0, 1)[0], fixed)
    space = network.search_space(bits)
    space = space.with_activations(activation_bits) if activation_bits else space
    limits = budgets.limits(space, keywords)  # refuses a call without a limit
    check_budgets(space, row_budgets[:1], limits[1:])
    packed = checked_criterion(criterion, [estimator], network)
    image_slice(network, images, classes="classes" in packed.offers)

    calibration = slices.calibration
    prepared = prepare(network, space, calibration, corrections=corrections, seed=seed, progress=progress)
    plain = prepare(network, space, calibration) if corrections else prepared
    as_module(
        prepared.network, prepared.chosen(space.narrowest)
    )  # a correction that a module cannot hold is refused before measuring
    names = list(dict.fromkeys(["layerwise", estimator]))
    matrices = measured(network, space, slices.sensitivity, names, criterion, prepared=prepared, progress=progress)

    def solving(program: Program) -> Solve:
        return solvers.prepare(program, solver, time_limit=time_limit)

    proposals = propose(matrices, row_budgets[:1], solving, limits[1:])
    if corrections:
        proposals += [_uncorrected(proposal) for proposal in proposals]
    candidates = {p.assignment: (plain if p.assignment.corrected == "none" else prepared) for p in proposals}
    with showing(progress, "choosing") as advance:
        scores = _scores(candidates, criterion, slices.selection, advance)
    results = _results(space, proposals, scores, limits[1:])
    chosen = next(row for row in results if row.method == CHOSEN)
    method = chosen.winner or CHOSEN
    deployed = candidates[chosen.assignment].deployed(chosen.assignment)
    with showing(progress, "evaluating") as advance:
        validation = validate(network, deployed, criterion, slices.validation, advance, metric)
    matrix = matrices.get(method)
    return Compressed(
        module=as_module(*deployed),
        assignment=chosen.assignment,
        space=space,
        method=method,
        loss_predicted=None if matrix is None else _predicted(matrix, chosen.assignment),
        loss_measured=validation.loss,
        accuracy=validation.accuracy,
        float_accuracy=validation.float_accuracy,
        agreement=validation.agreement,
        drop_interval=validation.drop_interval,
        num_images={name: len(getattr(slices, name)) for name in SETS},
        seed=seed,
        matrices=matrices,
        results=results,
        deployed=deployed,
    )


def split(images: ImageSlice, counts: Sequence[int | None], seed: int) -> DataSlices:
    """Four disjoint sets of images, drawn by a seed.

    Args:
        images: All images.
        counts: Images of the calibration, sensitivity, selection and validation set. None: the default.
        seed: Seed of the permutation of the images.

    Raises:
        DataError: There are too few images. The message says how many are needed.
        ConfigurationError: A count is not a positive integer.
    """
    for name, count in zip(SETS, counts, strict=True):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigurationError(f"{name}_images is {count!r}; expected a number of images, at least 1")
    default = min(MOST_IMAGES, max(LEAST_IMAGES, len(images) // len(SETS)))
    *firsts, last = [default if count is None else count for count in counts]
    needed = sum(firsts) + (LEAST_IMAGES if counts[-1] is None else last)
    if len(images) < needed:
        parts = zip(SETS, [*firsts, needed - sum(firsts)], strict=True)
        raise DataError(
            f"the data has {len(images):,} images; expected {needed:,} or more, in disjoint sets: "
            + ", ".join(f"{count:,} for {name}" for name, count in parts)
            + ". Give more images, or ask for smaller sets, such as calibration_images=32"
        )
    sizes = [*firsts, len(images) - sum(firsts) if counts[-1] is None else last]
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    ends = np.cumsum([0, *sizes]).tolist()
    calibration, sensitivity, selection, validation = (
        PickedSlice([images], order[start:stop]) for start, stop in zip(ends, ends[1:], strict=False)
    )
    return DataSlices(calibration, sensitivity, validation, selection)


def _network(model: nn.Module, example: Tensor, fixed: Sequence[str]) -> Network:
    """The module as a network. A copy of its weights has the memory layout that is fastest on the device."""
    check_model(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    channels_last = prefers_channels_last(model, device)
    if channels_last:
        model = deepcopy(model).to(memory_format=torch.channels_last)
    return Network(model, example.to(device), fixed, channels_last=channels_last)


def _uncorrected(proposal: Proposal) -> Proposal:
    """The same bits, rounded to nearest without corrections."""
    assignment = proposal.assignment.with_corrections("none")
    return replace(proposal, assignment=assignment, loss_predicted=None, solution=None, reported=False)


def _results(
    space: SearchSpace, proposals: Sequence[Proposal], scores: Mapping[Assignment, Scores], limits: Sequence[Constraint]
) -> tuple[Result, ...]:
    """One row for each reported proposal and for the chosen one, by the rules of `clado run`."""
    losses = {assignment: float(score.losses.mean()) for assignment, score in scores.items()}
    deciding = {assignment: _score(score) for assignment, score in scores.items()}
    return tuple(choose(space, proposals, losses, limits, deciding))


def _score(scores: Scores) -> Score:
    """The numbers that decide: Brier scores and hits, or the losses if there are no classes."""
    if scores.briers is None or scores.hits is None:
        return Score(scores.losses, np.zeros(0))
    return Score(scores.briers, scores.hits)


def _predicted(matrix: InteractionMatrix, assignment: Assignment) -> float | None:
    """The loss that a matrix predicts. It covers corrected layers only."""
    increase = matrix.predicted_increase(assignment)
    return matrix.loss_of(increase) if assignment.corrected == "all" and isfinite(increase) else None


def _scores(
    candidates: Mapping[Assignment, Prepared], criterion: Any, images: ImageSlice, advance: Advance
) -> dict[Assignment, Scores]:
    """The measurement of each assignment, deployed from its layers."""
    blocks = sample_blocks(len(images), -(-len(images) // BLOCK_IMAGES))
    benches: dict[int, Workbench] = {}
    scores = {}
    for k, (assignment, prepared) in enumerate(candidates.items()):
        if id(prepared) not in benches:
            benches[id(prepared)] = Workbench(prepared, criterion, blocks, images.load)
        network, layers = prepared.deployed(assignment)
        folded, replaced = network.folded_with(layers)
        bench = benches[id(prepared)]
        parts = [score_passes(bench.criterion, folded, replaced, bench.passes(block)) for block in range(len(blocks))]
        scores[assignment] = joined(parts)
        advance(k + 1, len(candidates))
    return scores
