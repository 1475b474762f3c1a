"""Float as a candidate: an option like any other, which costs 32 bits, changes nothing and is not measured."""

import json
from functools import cache

import numpy as np
import pytest
import torch

import clado
from clado.bits import check_candidates
from clado.choosing.constraints import constraint
from clado.errors import ConfigurationError
from clado.exporting.assignment import read_assignment
from clado.exporting.packed import export_packed, load_packed
from clado.exporting.runtimes.onnxruntime import runtime
from clado.interaction.estimators import Measured, estimate, kinds_of
from clado.measuring.kinds import tile_kinds
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, Workload, sample_blocks
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.plugins import available
from clado.quantization.preparation import Recipe, prepare
from clado.records.documents import space_document, space_of
from clado.settings.loading import parse_config
from clado.space import Assignment, Layer, SearchSpace
from tests.contracts.runtime import inverted
from tests.networks import Residual, build, images, labels
from tests.running import config
from tests.tolerance import assert_close, of_sum

pytestmark = pytest.mark.numeric

LAYERS = (
    Layer("a.weight", (3, 5), "linear", 10),
    Layer("b.weight", (2, 2, 3, 3), "conv2d", 20),
    Layer("c.weight", (7,), "linear", 5),
)
SPACE = SearchSpace.uniform(LAYERS, (2, 4, "float")).restricted({"b*": [8], "c*": ["float"]})
INPUTS = SPACE.with_activations([4, 8])


@pytest.mark.parametrize(
    ("candidates", "expected"), [([2, 8, "float"], (2, 8, None)), ([None], (None,)), ([4], (4,)), (["float"], (None,))]
)
def test_float_stands_behind_the_bit_widths(candidates, expected):
    assert check_candidates(candidates) == expected
    for wrong in (["float", *candidates], [*candidates, 2], [*candidates[:-1], "half"], "float"):
        with pytest.raises(ConfigurationError, match="bits"):
            check_candidates(wrong)


@pytest.mark.parametrize("space", [SPACE, INPUTS], ids=["weights", "inputs"])
def test_it_is_the_last_option_of_a_layer_and_leaves_its_input_in_float(space):
    widths = space.activation_widths
    assert [space.option(*option) for option in space.options] == list(range(space.num_options))
    assert space.num_options == 2 * len(widths) + 1 + len(widths) + 1
    assert [space.options[k] for k in space.float_options] == [(0, None, None), (2, None, None)]
    assert sorted(space.quantized_options + space.float_options) == list(range(space.num_options))
    assert space.widest.pairs == ((None, None), (8, widths[-1]), (None, None))
    assert [bits for bits, _ in space.uniform_assignments()] == [b for b in (2, 4, 8, 32) for _ in widths]
    for option in space.options_of(0):
        assignment = space.assignment([option, *(space.offsets[i] for i in (1, 2))])
        assert space.assignment(space.chosen_options(assignment)) == assignment == space.completed(assignment)
        assert space.from_json(json.loads(json.dumps(space.to_json(assignment)))) == assignment
    assert space_of(json.loads(json.dumps(space_document(space)))) == space
    assert space.label(space.float_options[0]) == "a.weight in float"


def test_a_space_of_nothing_but_float_is_refused():
    with pytest.raises(ConfigurationError, match="every layer has only the candidate float"):
        SPACE.restricted({"*": ["float"]})
    with pytest.raises(ConfigurationError, match=r"b\.weight has no float candidate; its candidates are \[8\]"):
        SPACE.option(1, None)


def test_it_costs_32_bits_a_weight_and_a_multiplication_of_floats():
    assignment = Assignment((None, 8, None), (None, 4, None))
    assert INPUTS.size_bytes(assignment) == 4 * 15 + 36 + 4 * 7
    for name, expected in [
        ("size", 4 * 15 + 36 + 4 * 7),
        ("relative_size", 4 * 15 + 36 + 4 * 7),
        ("average_bits", 32 * 22 + 8 * 36),
        ("bops", 32 * 32 * (10 + 5) + 8 * 4 * 20),
    ]:
        assert constraint(name, INPUTS, 100).value(INPUTS, assignment) == expected
    assert constraint("bops", SPACE, 100).value(SPACE, SPACE.widest) == 32 * 8 * (10 + 5) + 8 * 8 * 20


def test_a_table_of_costs_calls_it_float(tmp_path):
    rows = ["a.weight,2,4,1", "a.weight,2,8,1", "a.weight,4,4,1", "a.weight,4,8,1", "b.weight,8,4,2", "b.weight,8,8,2"]
    path = tmp_path / "times.csv"
    path.write_text("\n".join(["layer,bits,activation_bits,seconds", *rows, "a.weight,float,,16", "c.weight,float,,32"]))
    assert constraint("latency", INPUTS, 1.0, path=path).value(INPUTS, INPUTS.widest) == 16 + 2 + 32
    path.write_text("\n".join(["layer,bits,activation_bits,seconds", *rows]))
    with pytest.raises(ConfigurationError, match=r"lacks a\.weight in float, c\.weight in float"):
        constraint("latency", INPUTS, 1.0, path=path)


@cache
def measured(bits: tuple[int | str, ...], fixed: tuple[int | str, ...]) -> tuple[Workbench, Measured]:
    """Tiles of every kind of a network whose layer `grouped` has other candidates."""
    network = Network(build(Residual), images(8))
    space = network.search_space(bits).restricted({"grouped.*": fixed})
    x, y, blocks = images(12), labels(12), sample_blocks(12, 2)
    bench = Workbench(prepare(network, space, Recipe()), "cross_entropy", blocks, lambda a, b: (x[a:b], y[a:b]), 8)
    plan = Plan(space, blocks, tuple(tile_kinds()), space.num_options)
    sums = {kind: np.stack([measure_tile(bench, t) for t in plan.tiles if t.kind == kind]) for kind in plan.kinds}
    return bench, Measured(space, "cross_entropy", np.array([b - a for a, b in blocks]), sums)


def test_it_is_not_measured_and_no_other_number_changes():
    """The matrix has a row of zeros for it, and is that of the other candidates elsewhere.

    It is so bit for bit, but for Gram matrices, which are products of matrices of another shape.
    """
    (bench, without), (_, of_float) = measured((2, 8), (4, 8)), measured((2, 8, "float"), (4, 8, "float"))
    space, others = of_float.space, list(of_float.space.quantized_options)
    for name in available("estimators"):
        matrix = estimate(name, of_float)
        share = of_sum(6 * 4) if "gram" in kinds_of([name]) else 0.0
        assert_close(matrix.values[np.ix_(others, others)], estimate(name, without).values, share, least=0.0)
        assert not matrix.values[list(space.float_options)].any(), name
        assert matrix.predicted_increase(space.widest) == 0.0 == matrix.predicted_increase(space.nothing)
        pair = space.nothing.replace(0, 2).replace(2, 4)
        increases = matrix.predicted_increase(pair), estimate(name, without).predicted_increase(pair)
        assert increases[0] == pytest.approx(increases[1], rel=max(share, 1e-12), abs=1e-12)
    work = Workload(100, tuple(range(100, 0, -20)))
    for kind in tile_kinds():
        plans = [Plan(one.space, bench.sample_blocks, (kind,), 100) for one in (without, of_float)]
        assert len({sum(map(plan.evaluations, plan.tiles)) for plan in plans}) == 1, kind
        assert len({sum(plan.macs(tile, work) for tile in plan.tiles) for plan in plans}) == 1, kind


def test_a_layer_that_is_pinned_to_float_is_in_no_network_that_is_measured():
    (_, without), (_, of_float) = measured((2, 8), (4, 8)), measured((2, 8), ("float",))
    assert np.isfinite(of_float.sums["singles"]).all()
    others = [k for k, option in enumerate(without.space.options) if option.layer != 2]
    matrices = [estimate("pairwise", one) for one in (without, of_float)]
    kept = list(of_float.space.quantized_options)
    assert np.array_equal(matrices[0].values[np.ix_(others, others)], matrices[1].values[np.ix_(kept, kept)])


def test_corrections_leave_it_alone_and_a_network_of_it_is_the_float_one():
    x = images(24)
    network = Network(build(Residual), x[:1])
    space = network.search_space((2, "float")).restricted({"head.*": ["float"]}).with_activations([8])
    corrections = ("gptq", "output_statistics", "batchnorm_reestimation")
    prepared = prepare(network, space, Recipe(corrections=corrections), [x])
    for option in space.float_options:
        layer = prepared.layers[option]
        assert layer.weight is network.weights[space.options[option].layer]
        assert layer.bias is layer.activation is layer.grid is None
    assert prepared.deployed(space.widest) == (network, {})
    assert list(prepared.chosen(space.narrowest)) == [0, 1, 2, 3]


def test_files_hold_its_values_and_claim_their_bytes(tmp_path):
    network, x = inverted()
    space = network.search_space((4, "float")).with_activations([8])
    prepared = prepare(network, space, Recipe(), [x])
    chosen = space.assignment([space.offsets[i] + i % 2 for i in range(space.num_layers)])
    size = export_packed(tmp_path / "n.safetensors", *prepared.deployed(chosen))
    assert size.weight_bytes == space.size_bytes(chosen)
    module = load_packed(tmp_path / "n.safetensors", network)
    float_layers = [layer.name for layer, bits in zip(space.layers, chosen.bits, strict=True) if bits is None]
    for name in float_layers:
        assert torch.equal(module.state_dict()[name], network.model.state_dict()[name])
    expected = network.logits(x, prepared.deployed(chosen)[1])
    assert float((module(x).detach() - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
    runtime.write(tmp_path / "n.onnx", *prepared.deployed(chosen), x)
    kernels = runtime.kernels(tmp_path / "n.onnx")
    assert kernels["QLinearConv"] + kernels.get("QGemm", 0) == space.num_layers - len(float_layers)
    logits = torch.from_numpy(runtime.open(tmp_path / "n.onnx", 1)(x.numpy()))
    assert float((logits - expected).abs().mean()) <= 6 * float(expected.max() - expected.min()) / 255
    (tmp_path / "assignment.json").write_text(json.dumps(space.to_json(chosen)))
    assert read_assignment(tmp_path / "assignment.json", space) == chosen


def test_the_solver_keeps_sensitive_layers_in_float_where_the_budget_allows_it():
    x = images(16)
    network = Network(build(Residual), x[:1])
    space = network.search_space((2, "float"))
    matrix = clado.measure(network, space, x, estimator="layerwise")
    bound = space.size_bytes(space.narrowest) + max(layer.weight_bytes(None) for layer in space.layers)
    solution = clado.solve(matrix, size_bytes=bound)
    assert None in solution.assignment.bits
    assert space.size_bytes(solution.assignment) <= bound
    assert solution.objective < matrix.predicted_increase(space.narrowest)
    assert clado.solve(matrix, average_bits=32).objective == 0.0


@pytest.mark.parametrize("bits", [[2, "float", 4], ["float", "float"], [2, "half"], []])
def test_settings_that_name_it_wrongly_are_refused(bits, tmp_path):
    with pytest.raises(ConfigurationError, match="bits"):
        parse_config(config(tmp_path / "run", bits=bits))
