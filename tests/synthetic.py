"""Made-up runs for tests of what reads a record: plots, tables, the tracker. Numbers are plausible, seeded and consistent."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clado.interaction.matrix import InteractionMatrix
from clado.records.interval import Interval
from clado.records.results import Accuracy, Comparison, Result
from clado.records.run_record import RunRecord
from clado.space import Assignment, Layer, SearchSpace

BITS = (2, 4, 8)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
METHODS = ("uniform", "layerwise", "pairwise", "gauss_newton", "chosen")


def make_space(num_layers: int = 22, bits: tuple[int, ...] = BITS) -> SearchSpace:
    """Layers named and shaped as those of a residual network: a stem, blocks in four stages with projections, a classifier."""
    layers = [Layer("conv1.weight", (16, 1, 3, 3), "conv2d")]
    block = 0
    per_stage = max(1, (num_layers - 2) // 4)
    while len(layers) < num_layers - 1:
        stage, within = divmod(len(layers) - 1, per_stage)
        width = 16 * 2 ** min(stage, 3)
        block = within // 2
        name = f"layer{min(stage, 3) + 1}.{block + 20 * max(0, stage - 3)}"
        if within == per_stage - 1 and per_stage > 2:
            layers.append(Layer(f"{name}.downsample.0.weight", (width, width // 2, 1, 1), "conv2d"))
        else:
            layers.append(Layer(f"{name}.conv{within % 2 + 1}.weight", (width, width, 3, 3), "conv2d"))
    layers.append(Layer("fc.weight", (10, 64), "linear"))
    return SearchSpace.uniform(layers, bits)


def make_matrix(space: SearchSpace, estimator: str = "pairwise", seed: int = 0) -> InteractionMatrix:
    """Products of seeded error vectors that shrink fourfold a bit: heavy-tailed, of both signs, the diagonal positive."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(space.num_layers, 6)) * generator.gamma(1.0, 1.0, size=(space.num_layers, 1))
    errors = np.array([vectors[i] * 0.6 * 4.0 ** (2 - b) for i, b, _ in space.options])
    values = errors @ errors.T
    owner = np.array([option.layer for option in space.options])
    inside = owner[:, None] == owner[None, :]
    values[inside & ~np.eye(len(values), dtype=bool)] = 0.0
    if estimator == "layerwise":
        values = np.diag(np.diag(values))
    convexity = "clip_psd" if estimator == "pairwise" else "raw"
    return InteractionMatrix(space, (values + values.T) / 2, estimator, "kl_to_float", 0.0, 256, convexity=convexity)


def make_record(
    num_layers: int = 22,
    budgets: tuple[float, ...] = BUDGETS,
    methods: tuple[str, ...] = METHODS,
    seed: int = 0,
    network: str = "resnet20_fashion_mnist",
) -> RunRecord:
    """One result per budget and method; layerwise differs from pairwise in some layers and has the higher loss."""
    space = make_space(num_layers)
    generator = np.random.default_rng(seed)
    order = generator.permutation(num_layers)
    results: list[Result] = []
    for budget in budgets:
        base = _filled(space, budget, order)
        for method in methods:
            if method == "uniform":
                assignment = [a for b, a in space.uniform_assignments() if b <= budget][-1]
            elif method == "layerwise":
                assignment = _filled(space, budget, np.roll(order, 2 + num_layers // 8))
            elif method == "gauss_newton":
                assignment = _filled(space, budget, np.roll(order, 1))
            else:
                assignment = base
            average = space.average_bits(assignment)
            factor = {"uniform": 2.0, "layerwise": 1.3, "gauss_newton": 1.1}.get(method, 1.0)
            loss = factor * 0.8 * 4.0 ** (2 - average) + 1e-4
            solved = method not in ("uniform", "chosen")
            results.append(
                Result(
                    budget=f"{budget:g} bits",
                    method=method,
                    assignment=assignment,
                    size_bytes=space.size_bytes(assignment),
                    average_bits=average,
                    loss_deployed=loss,
                    brier_deployed=0.3 * loss,
                    agreement_deployed=float(np.exp(-loss)),
                    loss_predicted=0.9 * loss if solved else None,
                    status="optimal" if solved else None,
                    objective=0.9 * loss if solved else None,
                    bound=0.9 * loss if solved else None,
                    gap=0.0 if solved else None,
                    seconds=0.25 * budget if solved else None,
                    validation=Accuracy(10_000, 0.25 + loss, 0.1 + 0.83 * float(np.exp(-0.4 * loss)), 0.998 - 0.01 * loss),
                    winner="pairwise" if method == "chosen" else None,
                    gain=loss * 0.1 if method == "chosen" else None,
                )
            )
    return RunRecord(
        network=network,
        layer_names=space.names,
        layer_weights=tuple(layer.num_weights for layer in space.layers),
        fingerprint="0123456789abcdef" * 4,
        criterion="kl_to_float",
        baseline=0.0,
        float_accuracy=Accuracy(10_000, 0.21, 0.9312, 0.9985),
        results=tuple(results),
        comparisons=compared_rows(results),
        seconds={"start-up": 12.25, "measuring": 81.5, "solving": 9.0, "evaluation": 30.5, "shutdown": 2.0},
        forwards={"pairwise": 2211, "gauss_newton": 67, "layerwise": 66},
        notes=("activations are not quantized",),
        data={
            f"{name}_set": {"num_images": 256, "sha256": f"{name:_<12}" + 52 * "0"}
            for name in ("calibration", "sensitivity", "validation")
        },
        recorded="2026-11-25T12:00:00+00:00",
    )


def compared_rows(results: Sequence[Result]) -> tuple[Comparison, ...]:
    """The chosen answer against every other one, and the first method with interactions against layerwise, where they differ."""

    def interval(difference: float) -> Interval:
        return Interval(difference, difference - 0.002, difference + 0.002, 10_000)

    rows = {(result.budget, result.method): result for result in results}
    methods = list(dict.fromkeys(result.method for result in results))
    interacting = [method for method in ("pairwise", "gauss_newton") if method in methods][:1]
    pairs = [("chosen", method) for method in methods if method != "chosen"] + [(method, "layerwise") for method in interacting]
    comparisons = []
    for budget in dict.fromkeys(result.budget for result in results):
        for method, other in pairs:
            one, another = rows.get((budget, method)), rows.get((budget, other))
            if one is not None and another is not None and one.assignment != another.assignment:
                kl = one.loss_deployed - another.loss_deployed
                comparisons.append(Comparison(budget, method, other, interval(kl), interval(-kl / 3), interval(-kl / 4)))
    return tuple(comparisons)


def make_model(folder: Path) -> Path:
    """A folder as `export.model` writes it, except the weights, which no test loads."""
    folder.mkdir(parents=True)
    (folder / "packed.safetensors").write_bytes(b"weights of " + folder.name.encode())
    document = {
        "format": "clado-model/1",
        "name": "zoo.resnet20_fashion_mnist",
        "network": {"source": "zoo", "name": "resnet20_fashion_mnist"},
        "image_shape": [1, 28, 28],
        "num_classes": 10,
        "requirements": ["clado==0.1.0", "torch==2.15.0"],
    }
    (folder / "model.json").write_text(json.dumps(document))
    return folder


def with_activations(record: RunRecord, widths: tuple[int, ...], seed: int = 0) -> RunRecord:
    """The record with one of these widths for every layer's input activations."""
    generator = np.random.default_rng(seed)
    results = tuple(
        replace(
            result,
            assignment=Assignment(result.assignment.bits, tuple(generator.choice(widths, len(record.layer_names)).tolist())),
        )
        for result in record.results
    )
    return replace(record, results=results)


def _filled(space: SearchSpace, average_bits: float, order: np.ndarray) -> Assignment:
    """Widens layers in this order, twice round, as long as the average allows."""
    assignment = space.narrowest
    for bits in space.bit_widths[0][1:]:
        for layer in order:
            wider = assignment.replace(int(layer), bits)
            if space.average_bits(wider) <= average_bits:
                assignment = wider
    return assignment
