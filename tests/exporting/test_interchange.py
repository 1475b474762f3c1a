"""Assignments go out in our format and in peers', and come back the same; what does not fit is refused by name."""

import copy
import itertools
import json
import sys
from collections.abc import Callable
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import clado
from clado.errors import ConfigurationError, StoreError
from clado.exporting import snippets
from clado.exporting.assignment import read_assignment
from clado.exporting.snippets import Deployed, mct, modelopt, torchao, write_snippet
from clado.grids import ActivationGrid
from clado.plugins import available, load
from clado.quantization.preparation import Prepared
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Assignment, Layer, SearchSpace
from tests import tolerance
from tests.synthetic import make_space

SCHEMA = json.loads(resources.files("clado.exporting").joinpath("assignment.schema.json").read_text(encoding="utf-8"))
SEEDS = range(5)
SMALL = SearchSpace.uniform([Layer("a.weight", (4, 3, 3, 3), "conv2d"), Layer("b.c.weight", (5, 16), "linear")], (2, 4, 8))


ACTIVATIONS = pytest.mark.parametrize("widths", [(), (8,), (4, 8)], ids=["float", "one", "several"])


def random_assignment(space: SearchSpace, seed: int, floats: bool = False) -> Assignment:
    generator = np.random.default_rng(seed)
    options = [[*range(a, b), *([None] if floats else [])] for a, b in itertools.pairwise(space.offsets)]
    chosen = [choice[generator.integers(len(choice))] for choice in options]
    return space.assignment([option for option in chosen if option is not None])


def written(folder: Path, document: Any, name: str = "assignment.json") -> Path:
    file = folder / name
    file.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return file


def intx(bits: int | None, dtype: str = "int") -> dict[str, Any] | None:
    """What torchao 0.18's config_to_dict makes of an IntxWeightOnlyConfig, less the fields that are not read."""
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": f"{dtype}{bits}"}}
    return None if bits is None else {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def fqn(table: dict[str, Any]) -> dict[str, Any]:
    return {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": table}}


def quantizers(pairs: dict[str, int | None]) -> list[dict[str, Any]]:
    """ModelOpt's list: everything off, then each layer by name."""
    on = [{"quantizer_name": f"{n}_quantizer", "cfg": {"num_bits": b, "axis": 0}} for n, b in pairs.items() if b is not None]
    return [{"quantizer_name": "*", "enable": False}, *on]


def chosen_nodes(pairs: dict[str, int | None]) -> dict[str, Any]:
    """What json.dumps(config, default=vars) makes of MCT 2.6's BitWidthConfig."""
    rows = [
        {
            "filter": {"matcher_a": {"node_name": node}, "matcher_b": {"node_name": f"{node}_bn"}},
            "bit_width": 32 if bits is None else bits,
            "attr": "weight",
        }
        for node, bits in ((name.removesuffix(".weight").replace(".", "_"), bits) for name, bits in pairs.items())
    ]
    return {"manual_activation_bit_width_selection_list": [], "manual_weights_bit_width_selection_list": rows}


PEERS = available("snippets")
FORMATS: dict[str, Callable[[dict[str, int | None]], Any]] = {
    "parameters": dict,
    "modules": lambda pairs: {name.removesuffix(".weight"): bits for name, bits in pairs.items()},
    "modelopt": lambda pairs: {"quant_cfg": quantizers(pairs), "algorithm": "max"},
    "modelopt list": quantizers,
    "torchao": lambda pairs: fqn({name: intx(bits) for name, bits in pairs.items()}),
    "torchao modules": lambda pairs: fqn({name.removesuffix(".weight"): intx(bits) for name, bits in pairs.items()}),
    "mct": chosen_nodes,
}


@ACTIVATIONS
@pytest.mark.parametrize("seed", SEEDS)
def test_our_json_is_as_the_schema_says_and_reads_back(seed, widths, tmp_path):
    space = make_space().with_activations(widths)
    assignment = random_assignment(space, seed, floats=seed % 2 == 0)
    document = space.to_json(assignment)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert read_assignment(written(tmp_path, document), space) == assignment == space.from_json(document)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_peers_format_reads_as_the_assignment_it_was_made_from(name, seed, tmp_path):
    space = make_space()
    assignment = random_assignment(space, seed, floats=seed % 2 == 0)
    pairs = dict(zip(space.names, assignment.bits, strict=True))
    assert read_assignment(written(tmp_path, FORMATS[name](pairs)), space) == assignment


@ACTIVATIONS
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("peer", PEERS)
def test_a_snippet_is_python_and_reads_as_the_assignment_it_was_made_from(peer, seed, widths, tmp_path):
    space = make_space().with_activations(widths)
    assignment = random_assignment(space, seed, floats=seed % 2 == 0)
    file = write_snippet(tmp_path, peer, space, assignment)
    assert file == tmp_path / f"assignment_{peer}.py"
    compile(file.read_text(), str(file), "exec")
    assert max(map(len, file.read_text().splitlines())) <= 130
    assert read_assignment(file, space) == assignment == read_assignment(tmp_path / "assignment.json", space)


def test_the_schema_is_a_schema_and_ships_with_the_package():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == SMALL.to_json(SMALL.widest)["format"]


VALID = SMALL.to_json(Assignment((2, 4)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"further": [1]},
        {"status": "optimal", "loss_predicted": 0.25, "estimator": "pairwise"},
        {"bits": {"a.weight": 2.0, "b.c.weight": 4}},
        {"format": "clado-assignment/2"},
        {"bits": None},
        {"bits": {}},
        {"bits": {"a.weight": True, "b.c.weight": 4}},
        {"bits": {"a.weight": "2", "b.c.weight": 4}},
        {"bits": {"a.weight": 2.5, "b.c.weight": 4}},
        {"bits": {"a.weight": 0, "b.c.weight": 4}},
        {"bits": {"a.weight": 17, "b.c.weight": 4}},
        {"average_bits": "3"},
        {"average_bits": -1},
        {"average_bits": None},
        {"size_bytes": 67.5},
        {"size_bytes": -1},
        {"size_bytes": False},
        {"status": 1},
        {"estimator": None},
        {"loss_predicted": "0.1"},
    ],
    ids=json.dumps,
)
def test_the_reader_and_the_schema_agree(change, tmp_path):
    document = {**VALID, **change}
    valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    assert valid == (list(change) in ([], ["further"], ["status", "loss_predicted", "estimator"]) or "2.0" in json.dumps(change))
    file = written(tmp_path, document)
    if valid:
        assert read_assignment(file, SMALL) == Assignment((2, 4))
    else:
        with pytest.raises(ConfigurationError, match=str(file)):
            read_assignment(file, SMALL)


@pytest.mark.parametrize(
    "widths",
    [
        [],
        {},
        None,
        8,
        {"a.weight": True, "b.c.weight": 4},
        {"a.weight": "8"},
        {"a.weight": 0},
        {"a.weight": 17},
        {"a.weight": 4.5},
    ],
    ids=json.dumps,
)
def test_the_reader_and_the_schema_agree_on_activation_bits(widths, tmp_path):
    space = SMALL.with_activations((4, 8))
    document = {**VALID, "activation_bits": widths}
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    with pytest.raises(ConfigurationError, match="activation"):
        read_assignment(written(tmp_path, document), space)


@pytest.mark.parametrize(
    ("space", "widths", "message"),
    [
        ((), {"a.weight": 8, "b.c.weight": 8}, r"8-bit activations for a\.weight, but activations stay in float here"),
        ((8,), {"a.weight": 8, "z": 8}, "no searched layer is called z"),
        ((8,), {"a.weight": 4, "b.c.weight": 8}, r"a\.weight has no candidate with 4-bit .* one of \[8\] bits"),
        ((4, 8), {"a.weight": 4}, r"no activation bits for b\.c\.weight; expected one of \[4, 8\]"),
        ((4, 8), {"a.weight": 4, "b.c.weight": None}, r"no activation bits for b\.c\.weight"),
        ((4, 8), None, r"no activation bits for a\.weight"),
    ],
)
def test_activation_bits_that_do_not_fit_are_refused_by_name(space, widths, message, tmp_path):
    document = {**VALID, "activation_bits": widths} if widths else VALID
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    with pytest.raises(ConfigurationError, match=message):
        read_assignment(written(tmp_path, document), SMALL.with_activations(space))


@pytest.mark.parametrize("name", FORMATS)
def test_what_says_nothing_of_activations_takes_the_one_width_there_is(name, tmp_path):
    space = make_space().with_activations([8])
    assignment = random_assignment(space, 0, floats=True)
    pairs = dict(zip(space.names, assignment.bits, strict=True))
    assert read_assignment(written(tmp_path, FORMATS[name](pairs)), space) == assignment


@pytest.mark.parametrize("peer", PEERS)
def test_a_snippet_says_what_becomes_of_activations(peer):
    space = SMALL.with_activations([4, 8])
    text = load("snippets", peer).snippet(space, space.widest)
    assert ("quantize(network, images)" in text) == (peer == "modelopt")
    assert ("does not apply it" in text) == (peer != "modelopt")
    with pytest.raises(ConfigurationError, match=r"a\.weight has activations at 1 bits"):
        load("snippets", peer).snippet(SMALL.with_activations([1]), SMALL.widest)


@pytest.mark.parametrize("key", ["bits", "average_bits", "size_bytes"])
def test_a_required_field_is_missed_by_name(key, tmp_path):
    document = {name: value for name, value in VALID.items() if name != key}
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    with pytest.raises(ConfigurationError, match=f"{key} is None"):
        read_assignment(written(tmp_path, document), SMALL)


def entry(quantizer: str, **fields: Any) -> dict[str, Any]:
    return {"quantizer_name": quantizer, **fields}


def node(name: str, bits: Any = 2, attr: str = "weight") -> dict[str, Any]:
    return {"filter": {"node_name": name}, "bit_width": bits, "attr": attr}


def nodes(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"manual_weights_bit_width_selection_list": list(rows)}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1, 2]", "quant_cfg holds 1"),
        ("3", "not an assignment"),
        ("{}", "not an assignment"),
        ({"bits": {"a": 2}}, "not an assignment"),
        ('{"a": 2, "a": 4, "b.c": 2}', "named twice: a$"),
        ({"a": 2, "a.weight": 4, "b.c": 2}, r"named twice: a\.weight"),
        ({"a": 2}, r"missing: b\.c\.weight$"),
        ({"a": 2, "b.c": 4, "b.d.weight": 4}, r"no searched layer is called b\.d\.weight \(did you mean 'b\.c\.weight'\?\)$"),
        ({"a": 3, "b.c": 4}, r"a\.weight has 3 bits, which were not measured; its candidates are \[2, 4, 8\]$"),
        ({"a": "2", "b.c": 40}, r"a\.weight has '2', expected an integer within 1..16; b\.c\.weight has 40"),
        ({"a": True, "b.c": 4}, r"a\.weight has True"),
        ({**VALID, "bits": {"a": 2, "b.c.weight": 4}}, r"called a.*missing: a\.weight"),
        ({**VALID, "size_bytes": 68}, "size_bytes is 68, but this assignment has 67"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 4}}}, "its order is ambiguous"),
        ([entry("a.weight_quantizer", cfg={"num_bits": 2})], r"missing: b\.c\.weight"),
        (
            [entry("*", cfg={"num_bits": 4}), entry("d.weight_quantizer", enable=False)],
            r"has the quantizer 'd\.weight_quantizer'",
        ),
        ([entry("*weight_quantizer", cfg={"num_bits": [4, 3]})], r"a\.weight has \[4, 3\]"),
        ([entry("*weight_quantizer", cfg=[{"num_bits": 4}, {"num_bits": 8}])], r"a\.weight has \[\{'num_bits': 4\}"),
        ([{"*weight_quantizer": {"num_bits": 4}}], "quant_cfg holds"),
        ({"_type": "IntxWeightOnlyConfig", "_data": {}}, "'IntxWeightOnlyConfig' names no layers"),
        (fqn({"a": intx(2)}), r"missing: b\.c\.weight"),
        (fqn({"_default": intx(2)}), r"missing: a\.weight$"),
        (fqn({"a": intx(2), "b.c": intx(4), "d": intx(4)}), "no searched layer is called d"),
        (fqn({"a": {"_type": "Float8WeightOnlyConfig", "_data": {}}, "b.c": intx(2)}), "has 'Float8WeightOnlyConfig'"),
        (fqn({"a": intx(4, "uint"), "b.c": intx(2)}), "has 'IntxWeightOnlyConfig'"),
        (fqn({"re:(": intx(2)}), "is not a regular expression"),
        (nodes(node("a")), r"missing: b\.c\.weight"),
        (nodes(node("a"), node("b_c", attr="bias")), r"missing: b\.c\.weight"),
        (nodes(node("a"), node("b_c"), node("b_d")), "no searched layer is called b_d"),
        (nodes({"filter": {"node_name_scope": "a"}, "bit_width": 2, "attr": "weight"}), "only choices by node name"),
        (nodes(node("a"), node("b_c", 3)), r"b\.c\.weight has 3 bits"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(document, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_assignment(written(tmp_path, document), SMALL)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BITS = {", "cannot be read"),
        ("bits = {}", "no literal BITS"),
        ("BITS = dict(a=2)", "no literal BITS"),
        ("BITS = {'a': 2}\nraise SystemExit", r"missing: b\.c\.weight"),
    ],
)
def test_a_python_file_is_read_and_not_run(text, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        read_assignment(written(tmp_path, text, "assignment_mct.py"), SMALL)


@pytest.mark.parametrize(
    ("document", "bits"),
    [
        ([entry("*weight_quantizer", cfg={"axis": 0}), entry("a.*", cfg={"num_bits": 2})], (2, 8)),
        ([entry("a.*", cfg={"num_bits": 2}), entry("*weight_quantizer", cfg={"num_bits": 4})], (4, 4)),
        ([entry("*", cfg={"num_bits": 4}), entry("*weight_quantizer", cfg={"num_bits": 2}, parent_class="nn.Linear")], (4, 2)),
        ([entry("*", cfg={"num_bits": 4}), entry("*", enable=False), entry("b.*", enable=True)], (None, 4)),
        ([entry("*", cfg={"num_bits": 4}), entry("*input_quantizer", enable=False)], (4, 4)),
        (fqn({"a.weight": intx(2), "a": intx(4), "re:.*": intx(8)}), (2, 8)),
        (fqn({"re:b.*": intx(2), "re:.*": intx(8), "_default": intx(4)}), (8, 2)),
        (fqn({"a": intx(2), "_default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}), (2, 8)),
        (nodes(node("a"), node("b_c", 4), node("a_bn", 8), node("a", 2, "bias")), (8, 4)),
    ],
)
def test_the_order_of_rules_is_the_peers(document, bits, tmp_path):
    assert read_assignment(written(tmp_path, document), SMALL) == Assignment(bits)


def test_a_node_that_could_be_two_layers_is_refused(tmp_path):
    space = SearchSpace.uniform([Layer("a.b.weight", (2, 2), "linear"), Layer("a_b.weight", (2, 2), "linear")], (2,))
    with pytest.raises(ConfigurationError, match=r"a_b could be any of a\.b\.weight, a_b\.weight"):
        read_assignment(written(tmp_path, nodes(node("a_b"))), space)


@pytest.mark.parametrize("peer", [modelopt, mct, torchao], ids=lambda peer: peer.__name__)
@pytest.mark.parametrize(
    ("layer", "bits", "message"),
    [
        (Layer("attention.in_proj_weight", (6, 2), "linear"), 4, r"attention\.in_proj_weight is not the weight of a module"),
        (Layer("up.weight", (6, 2), "matmul"), 4, r"up\.weight is used by matmul"),
        (Layer("one.weight", (6, 2), "linear"), 1, r"one\.weight has 1 bits"),
    ],
)
def test_what_a_peer_cannot_express_is_refused_by_name(peer, layer, bits, message):
    space = SearchSpace.uniform([layer, *SMALL.layers], (1, 2, 4))
    with pytest.raises(ConfigurationError, match=message):
        peer.snippet(space, Assignment((bits, 2, 4)))
    assert peer.snippet(space, Assignment((None, 2, 4)))


def test_torchao_takes_neither_more_than_eight_bits_nor_other_convolutions():
    space = SearchSpace.uniform([Layer("a.weight", (6, 2), "linear"), Layer("b.weight", (6, 2, 3), "conv1d")], (8, 9))
    with pytest.raises(ConfigurationError, match=r"a\.weight has 9 bits, and torchao takes 2 to 8; b\.weight is used by conv1d"):
        torchao.snippet(space, Assignment((9, 8)))


def test_an_export_of_another_assignment_is_left_alone(tmp_path):
    write_snippet(tmp_path, "mct", SMALL, Assignment((2, 4)))
    before = (tmp_path / "assignment.json").read_bytes()
    with pytest.raises(StoreError, match="another assignment"):
        write_snippet(tmp_path, "modelopt", SMALL, Assignment((4, 4)))
    assert (tmp_path / "assignment.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["assignment.json", "assignment_mct.py"]


def test_every_peer_has_a_module():
    assert all(callable(load("snippets", peer).snippet) for peer in PEERS)
    with pytest.raises(ConfigurationError, match="unknown format 'onnx'; expected safetensors, mct, modelopt or torchao"):
        snippets.peer_of("onnx")


# --- a run's commands


def command(*arguments: Any) -> Any:
    from flows.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("peer", PEERS)
def test_the_command_writes_a_snippet_that_scores_as_its_own_assignment(peer, finished, tmp_path):
    told = command("export", finished.folder, "--budget", 3, "--format", peer, "--output", tmp_path)
    assert told.exit_code == 0, told.output
    assert f"Wrote {tmp_path}/assignment_{peer}.py" in told.output
    ours, theirs = (command("score", finished.folder, tmp_path / name) for name in ("assignment.json", f"assignment_{peer}.py"))
    assert ours.exit_code == theirs.exit_code == 0, ours.output + theirs.output
    assert ours.output == theirs.output
    assert all(name in ours.output for name in ("predicted loss", "layerwise", "pairwise", "gauss_newton"))


def test_the_commands_refuse_by_name(finished, tmp_path):
    told = command("export", finished.folder, "--budget", 3, "--format", "onyx", "--output", tmp_path / "none")
    assert told.exit_code == 2
    assert "unknown format 'onyx'" in told.output
    assert not (tmp_path / "none").exists()
    told = command("score", finished.folder, written(tmp_path, {"conv1": 3}))
    assert told.exit_code == 2
    assert "conv1.weight has 3 bits" in told.output
    assert "missing: layer1.0.conv1.weight" in told.output


# --- the peers themselves, where they are installed


def deployed() -> tuple[torch.nn.Module, SearchSpace]:
    """The shipped network as it was drawn, and a space of its layers."""
    from clado.data.zoo import NETWORKS

    network = NETWORKS["resnet20_fashion_mnist"]().eval()
    layers = [
        Layer(f"{name}.weight", tuple(module.weight.shape), "conv2d" if isinstance(module, torch.nn.Conv2d) else "linear")
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    return network, SearchSpace.uniform(layers, (2, 3, 4, 8))


def loaded(peer: str, space: SearchSpace, assignment: Assignment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The snippet, imported as a user would."""
    write_snippet(folder, peer, space, assignment)
    return imported_snippet(peer, folder, monkeypatch)


def imported_snippet(peer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, f"assignment_{peer}", raising=False)
    return import_module(f"assignment_{peer}")


def imported(name: str) -> ModuleType:
    """A peer that may be missing, or installed without what it needs."""
    return pytest.importorskip(name, exc_type=ImportError)


quiet = pytest.mark.filterwarnings("ignore")  # peers warn at import and in passing; none of it is ours
IMAGES = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
PACKAGES = {"modelopt": "modelopt.torch.quantization", "mct": "model_compression_toolkit", "torchao": "torchao.quantization"}
CALIBRATION = {"mct": (lambda: iter([[IMAGES]]),)}


@quiet
def test_modelopt_takes_the_assignment(tmp_path, monkeypatch):
    imported(PACKAGES["modelopt"])
    network, space = deployed()
    assignment = random_assignment(space, 1, floats=True)
    module = loaded("modelopt", space, assignment, tmp_path, monkeypatch)
    before = network(IMAGES)
    module.quantize(network)
    for name, bits in zip(space.names, assignment.bits, strict=True):
        quantizer = network.get_submodule(f"{name}_quantizer")
        assert (quantizer.num_bits if quantizer.is_enabled else None) == bits
        if bits is not None:
            weight = network.get_parameter(name)
            assert quantizer.amax.numel() == len(weight)
            assert max(len(row.unique()) for row in quantizer(weight)) <= 2**bits - 1
    others = [n for n, m in network.named_modules() if n.endswith(("input_quantizer", "output_quantizer")) and m.is_enabled]
    assert others == []
    assert 0 < (network(IMAGES) - before).abs().max() < 20
    assert read_assignment(written(tmp_path, module.QUANT_CFG, "quant_cfg.json"), space) == assignment


@quiet
def test_modelopt_quantizes_inputs_as_assigned(tmp_path, monkeypatch):
    imported(PACKAGES["modelopt"])
    network, space = deployed()
    space = space.with_activations((4, 8))
    assignment = random_assignment(space, 1, floats=True)
    module = loaded("modelopt", space, assignment, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"expected quantize\(network, images\)"):
        module.quantize(network)
    before = network(IMAGES)
    module.quantize(network, IMAGES)
    for name, (bits, width) in zip(space.names, assignment.pairs, strict=True):
        weight, inputs = (
            network.get_submodule(n) for n in (f"{name}_quantizer", f"{name.removesuffix('.weight')}.input_quantizer")
        )
        assert tuple(q.num_bits if q.is_enabled else None for q in (weight, inputs)) == (bits, width)
        if width is not None:
            assert inputs.amax.numel() == 1
            assert len(inputs(torch.linspace(-1, 1, 1000) * inputs.amax).unique()) in (2**width - 1, 2**width)
    assert 0 < (network(IMAGES) - before).abs().max() < 20


@quiet
def test_torchao_takes_the_assignment(tmp_path, monkeypatch):
    imported(PACKAGES["torchao"])
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig

    network, space = deployed()
    assignment = random_assignment(space, 2, floats=True).replace(space.num_layers - 1, 3)  # the linear layer's rule is used
    module = loaded("torchao", space, assignment, tmp_path, monkeypatch)
    before = network(IMAGES)
    module.quantize(network)
    for layer, bits in zip(space.layers, assignment.bits, strict=True):
        weight = network.get_parameter(layer.name)
        assert getattr(weight, "target_dtype", None) == (None if bits is None else getattr(torch, f"int{bits}"))
        if bits is not None:
            assert weight.scale.numel() == layer.num_channels
            assert -(2 ** (bits - 1)) <= int(weight.qdata.min()) < int(weight.qdata.max()) < 2 ** (bits - 1)
    assert 0 < (network(IMAGES) - before).abs().max() < 20
    table = {
        name: None if bits is None else IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"))
        for name, bits in zip(space.names, assignment.bits, strict=True)
    }
    document = config_to_dict(FqnToConfig(table))
    assert read_assignment(written(tmp_path, document, "fqn_to_config.json"), space) == assignment


@quiet
def test_mct_takes_the_assignment(tmp_path, monkeypatch):
    imported(PACKAGES["mct"])
    network, space = deployed()
    assignment = random_assignment(space, 3, floats=True)
    module = loaded("mct", space, assignment, tmp_path, monkeypatch)
    before = network(IMAGES)
    quantized = module.quantize(network, *CALIBRATION["mct"])
    wrappers = {name.removesuffix("_bn"): m for name, m in quantized.named_modules() if hasattr(m, "weights_quantizers")}
    bits_of = {name: m.weights_quantizers["weight"].num_bits for name, m in wrappers.items() if m.weights_quantizers}
    pairs = dict(zip(space.names, assignment.bits, strict=True))
    assert bits_of == {n.removesuffix(".weight").replace(".", "_"): bits for n, bits in pairs.items() if bits is not None}
    assert all(m.weights_quantizers["weight"].per_channel for m in wrappers.values() if m.weights_quantizers)
    assert 0 < (quantized(IMAGES) - before).abs().max() < 20
    document = json.loads(json.dumps(module.bit_widths(network), default=vars))
    # MCT leaves in float what it is not told about; here float is said by name
    floats = chosen_nodes({name: None for name, bits in pairs.items() if bits is None})
    for key, rows in floats.items():
        document[key] += rows
    assert read_assignment(written(tmp_path, document, "bit_widths.json"), space) == assignment


def prepared(symmetric: bool = True, widths: tuple[int, ...] = ()) -> tuple[clado.Network, Prepared]:
    """A small network with every option corrected, a bias that a correction adds among what changes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3, bias=False),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 24 * 24, 5),
    ).eval()  # fmt: skip
    network = clado.Network(model, IMAGES)
    space = network.search_space((2, 3, 4)).with_activations(widths)
    images = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(symmetric=symmetric)
    return network, clado.prepare(network, space, images, quantizer=quantizer, corrections=("gptq", "output_statistics"))


def carried(
    peer: str, ready: Prepared, bits: tuple[int | None, ...], folder: Path, widths: tuple[int, ...] = ()
) -> tuple[Deployed, Path]:
    """What is deployed at some bits, and the snippet that was written with it."""
    assignment = Assignment(bits, widths)
    network_and_layers = ready.deployed(assignment)
    return network_and_layers, write_snippet(folder, peer, ready.space, assignment, deployed=network_and_layers)


BITS = (3, None, 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("peer", PEERS)
def test_what_lies_beside_a_snippet_is_what_was_measured(peer, symmetric, tmp_path):
    network, ready = prepared(symmetric)
    (corrected, layers), _ = carried(peer, ready, BITS, tmp_path)
    file = tmp_path / f"weights_{peer}.safetensors"
    assert file.is_file() == (peer == "torchao" or (peer == "modelopt" and symmetric))
    if not file.is_file():
        return
    tensors = load_file(file)
    scales = {name: tensors.pop(name) for name in list(tensors) if ":" in name}
    module = clado.quantize(network, Assignment(BITS), prepared=ready)
    module.load_state_dict(tensors)
    torch.testing.assert_close(module(IMAGES), clado.quantize(network, Assignment(BITS), prepared=ready)(IMAGES), rtol=0, atol=0)
    for i in layers:
        name, bits = corrected.layers[i].name, BITS[i]
        scale, zero_point = (scales[f"{name}:{part}"].double()[:, None] for part in ("scale", "zero_point"))
        codes = tensors[name].double().flatten(1) / scale + zero_point
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert -(2 ** (bits - 1)) <= codes.round().min() < codes.round().max() < 2 ** (bits - 1)


@pytest.mark.parametrize("peer", PEERS)
def test_what_a_peer_rounds_is_emulated(peer):
    network, ready = prepared()
    deployed_as = ready.deployed(Assignment(BITS))
    known = snippets.peer_of(peer)
    emulated, layers = known.computed(network, deployed_as)
    if known.carries(deployed_as):
        assert emulated is deployed_as[0]
        assert all(layers[i].weight is layer.weight for i, layer in deployed_as[1].items())
        return
    assert emulated is network
    assert sorted(layers) == [0, 2]
    for i, layer in layers.items():
        weight = network.weights[i].detach()
        assert levels(layer.weight, 0) <= 2 ** BITS[i]
        assert 0 < float((layer.weight - weight).square().mean()) < float(weight.square().mean())


def test_an_input_is_emulated_on_the_peers_grid():
    ours = ActivationGrid.of_range(0.0, 3.0, 4)
    theirs = modelopt.peer.input_grid(ours)
    x = torch.linspace(-4, 4, 1001)
    assert theirs.fake_quantize(x).max() == pytest.approx(3.0, rel=1e-6)  # the same range, in half as many steps behind a ReLU
    assert len(theirs.fake_quantize(x.clamp_min(0)).unique()) == 8
    assert torchao.peer.input_grid(ours) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("peer", ["modelopt", "torchao"])
@quiet
def test_a_peer_that_takes_scales_computes_what_was_measured(peer, symmetric, tmp_path, monkeypatch):
    imported(PACKAGES[peer])
    network, ready = prepared(symmetric)
    if peer == "modelopt" and not symmetric:
        return
    expected = clado.quantize(network, Assignment(BITS), prepared=ready)(IMAGES)
    carried(peer, ready, BITS, tmp_path)
    actual = imported_snippet(peer, tmp_path, monkeypatch).quantize(copy.deepcopy(network.model))(IMAGES)
    tolerance.assert_close(actual, expected, tolerance.of_forward(4, 6 * 24 * 24))


@quiet
def test_modelopt_takes_the_ranges_of_inputs(tmp_path, monkeypatch):
    imported(PACKAGES["modelopt"])
    network, ready = prepared(widths=(8,))
    deployed_as, _ = carried("modelopt", ready, BITS, tmp_path, (8, None, 8))
    emulated, layers = modelopt.peer.computed(network, deployed_as)
    actual = imported_snippet("modelopt", tmp_path, monkeypatch).quantize(copy.deepcopy(network.model))(IMAGES)
    torch.testing.assert_close(actual, emulated.logits(IMAGES, layers), rtol=0, atol=0.02 * float(actual.abs().max()))


@quiet
def test_the_emulated_rounding_is_modelopts(tmp_path, monkeypatch):
    imported(PACKAGES["modelopt"])
    network, ready = prepared()
    write_snippet(tmp_path, "modelopt", ready.space, Assignment(BITS))
    module = imported_snippet("modelopt", tmp_path, monkeypatch).quantize(copy.deepcopy(network.model))
    for i in (0, 2):
        weight, theirs = network.weights[i].detach(), module.get_submodule(f"{network.layers[i].name}_quantizer")
        torch.testing.assert_close(modelopt.peer.rounded(weight, BITS[i], 0), theirs(weight).detach(), rtol=1e-5, atol=1e-6)


class Branches(torch.nn.Module):
    """A grouped convolution, a transposed one (output channels along axis 1), and names that torch.fx changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inputProj = torch.nn.Conv2d(1, 6, 3, bias=False)
        self.add = torch.nn.Conv2d(6, 6, 3, groups=6)
        self.up = torch.nn.ConvTranspose2d(6, 4, 2)
        self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 25 * 25, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.add(self.inputProj(x)).relu()))


BRANCHES = (
    Layer("inputProj.weight", (6, 1, 3, 3), "conv2d"),
    Layer("add.weight", (6, 1, 3, 3), "conv2d"),
    Layer("up.weight", (6, 4, 2, 2), "conv_transpose2d", channel_axis=1),
    Layer("head.1.weight", (3, 2500), "linear"),
)


def levels(weight: torch.Tensor, axis: int) -> int:
    """The most distinct values of one output channel."""
    return max(len(row.unique()) for row in weight.detach().movedim(axis, 0).flatten(1))


@pytest.mark.parametrize("peer", PEERS)
@quiet
def test_grouped_and_transposed_convolutions_keep_one_scale_a_channel(peer, tmp_path, monkeypatch):
    imported(PACKAGES[peer])
    torch.manual_seed(0)
    network = Branches().eval()
    layers = [layer for layer in BRANCHES if peer != "torchao" or layer.operator != "conv_transpose2d"]
    space = SearchSpace.uniform(layers, (2, 3, 4))
    assignment = Assignment((3, 2, *((4,) if peer != "torchao" else ()), 4))
    module = loaded(peer, space, assignment, tmp_path, monkeypatch)
    quantized = module.quantize(network, *CALIBRATION.get(peer, ()))
    for layer, bits in zip(space.layers, assignment.bits, strict=True):
        if peer == "modelopt":
            quantizer = quantized.get_submodule(f"{layer.name}_quantizer")
            scales, weight = quantizer.amax, quantizer(quantized.get_parameter(layer.name))
        elif peer == "torchao":
            scales, weight = quantized.get_parameter(layer.name).scale, quantized.get_parameter(layer.name).dequantize()
        else:
            wrapper = quantized.get_submodule(module.nodes(network)[layer.name])
            scales, weight = wrapper.weights_quantizers["weight"].scales, wrapper.get_quantized_weights()["weight"]
        assert scales.numel() == layer.num_channels, layer.name
        assert levels(weight, layer.channel_axis) <= 2**bits
    assert bool(torch.isfinite(quantized(IMAGES)).all())
    if peer == "mct":
        document = json.dumps(module.bit_widths(network), default=vars)
        assert read_assignment(written(tmp_path, document, "bit_widths.json"), space) == assignment


@quiet
def test_modelopt_is_not_asked_for_what_it_would_pass_over(tmp_path, monkeypatch):
    imported(PACKAGES["modelopt"])
    network = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 1))
    space = SearchSpace.uniform([Layer("0.out_proj.weight", (4, 4), "linear")], (4,))
    module = loaded("modelopt", space, Assignment((4,)), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"MultiheadAttention: \['0\.out_proj\.weight'\]"):
        module.quantize(network)


@pytest.mark.parametrize("peer", PEERS)
@quiet
def test_a_snippet_refuses_a_network_whose_weights_are_shared(peer, tmp_path, monkeypatch):
    imported(PACKAGES[peer])
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    network[1].weight = network[0].weight
    space = SearchSpace.uniform([Layer("0.weight", (4, 4), "linear")], (4,))
    module = loaded(peer, space, Assignment((4,)), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"0\.weight', '1\.weight"):
        module.quantize(network, *CALIBRATION.get(peer, ()))
