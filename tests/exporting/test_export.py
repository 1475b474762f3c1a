"""What is exported loads back bit for bit, or is refused with names; nothing is half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clado.errors import NetworkError, StoreError
from clado.exporting import safetensors as exporter
from clado.exporting.safetensors import export_network, load_network
from clado.exporting.snippets import write_snippet
from clado.space import Assignment, Layer, SearchSpace

SNIPPET = "from clado.exporting.safetensors import load_network\nnetwork = make()\nload_network(folder, network)"


def make_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def make_document(bits: tuple[int, int] = (2, 4)) -> dict[str, Any]:
    layers = [Layer("0.weight", (4, 3, 3, 3), "conv2d"), Layer("3.weight", (5, 16), "linear")]
    return SearchSpace.uniform(layers, (2, 4)).to_json(Assignment(bits))


def export(folder: Path, seed: int = 0, bits: tuple[int, int] = (2, 4)) -> nn.Sequential:
    network = make_network(seed)
    export_network(folder, network.state_dict(), make_document(bits), SNIPPET)
    return network


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_network_becomes_the_exported_one(tmp_path: Path) -> None:
    network, other = export(tmp_path / "deep" / "export", seed=0), make_network(seed=1)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network.eval(), other.eval()
    assert not torch.equal(network(images), other(images))
    assert load_network(tmp_path / "deep" / "export", other) == make_document()
    assert torch.equal(network(images), other(images))
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_folder_holds_three_whole_files(tmp_path: Path) -> None:
    export(tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", "assignment.json", "weights.safetensors"]
    assert json.loads((tmp_path / "assignment.json").read_text()) == make_document()
    readme = (tmp_path / "README.md").read_text()
    assert f"```python\n{SNIPPET}\n```" in readme
    assert "| `0.weight` | 2 |" in readme


def test_bits_of_activations_are_documented_and_said_to_be_outside_the_file(tmp_path: Path) -> None:
    layers = [Layer("0.weight", (4, 3, 3, 3), "conv2d"), Layer("3.weight", (5, 16), "linear")]
    document = SearchSpace.uniform(layers, (2, 4)).with_activations((4, 8)).to_json(Assignment((2, 4), (8, 4)))
    export_network(tmp_path, make_network().state_dict(), document, SNIPPET)
    assert load_network(tmp_path, make_network(1)) == document
    readme = (tmp_path / "README.md").read_text()
    assert "| layer | bits | activation bits |\n|---|---|---|\n| `0.weight` | 2 | 8 |\n" in readme
    assert "float activations" in readme


def test_tied_and_strided_weights_are_kept(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    state = {**network.state_dict(), "0.bias": torch.arange(8.0)[::2]}
    document = SearchSpace.uniform([Layer("0.weight", (4, 4), "linear")], (2,)).to_json(Assignment((2,)))
    export_network(tmp_path, state, document, SNIPPET)
    load_network(tmp_path, network)
    assert network[0].bias.tolist() == [0, 2, 4, 6]
    assert network[1].weight is network[0].weight


def test_parts_of_a_split_weight_are_rows_of_the_tensor_in_the_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2)
    layers = [Layer(f"in_proj_weight.{part}", (4, 4), "linear") for part in "qkv"]
    document = SearchSpace.uniform(layers, (2, 4)).to_json(Assignment((2, 4, 4)))
    export_network(tmp_path, attention.state_dict(), document, SNIPPET)
    assert load_network(tmp_path, nn.MultiheadAttention(4, 2)) == document
    with pytest.raises(NetworkError, match=r"lacks layers of the assignment: in_proj_weight\.k"):
        export_network(tmp_path, nn.Linear(4, 4).state_dict(), document, SNIPPET)


def test_beside_a_damaged_assignment_nothing_is_written(tmp_path: Path) -> None:
    layers = [Layer("0.weight", (4, 3, 3, 3), "conv2d")]
    (tmp_path / "assignment.json").write_text("{")
    with pytest.raises(StoreError, match="holds the export of another assignment"):
        write_snippet(tmp_path, "torchao", SearchSpace.uniform(layers, (4, 8)), Assignment((8,)))
    assert contents(tmp_path) == {"assignment.json": b"{"}


def test_a_later_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    export(tmp_path, seed=0, bits=(2, 2))
    network, other = export(tmp_path, seed=3, bits=(4, 4)), make_network(seed=1)
    assert load_network(tmp_path, other)["bits"] == {"0.weight": 4, "3.weight": 4}
    assert torch.equal(other[0].weight, network[0].weight)


def test_another_projects_readme_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(StoreError, match=r"holds a README\.md and no weights\.safetensors"):
        export(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("README.md", "# My project")]


def test_every_file_is_readable_by_all_who_may_read_the_folder(tmp_path: Path) -> None:
    export(tmp_path / "out")
    assert {file.stat().st_mode & 0o444 for file in (tmp_path / "out").iterdir()} == {0o444}


def test_a_bias_that_corrections_added_is_loaded_into_a_layer_without_one(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    layers = [Layer("1.weight", (3, 4), "linear")]
    document = SearchSpace.uniform(layers, (2, 4)).to_json(Assignment((2,)))
    state = {"1.weight": torch.ones(3, 4), "1.bias": torch.full((3,), 2.0)}
    export_network(tmp_path, state, document, SNIPPET)
    load_network(tmp_path, network)
    assert torch.equal(network(torch.zeros(1, 4)), torch.full((1, 3), 2.0))
    taken = nn.Sequential(nn.Flatten(), nn.Bilinear(4, 4, 3))
    with pytest.raises(NetworkError, match=r"tensors differ|has no"):
        load_network(tmp_path, taken)


def test_a_failed_write_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path)
    before = contents(tmp_path)

    def full_disk(tensors: object, filename: str, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(exporter, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(tmp_path, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_weights_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = make_network().state_dict()
    state["3.weight"][0, 0] = value
    with pytest.raises(NetworkError, match=r"NaN or an infinity: 3\.weight"):
        export_network(tmp_path / "export", state, make_document(), SNIPPET)
    assert not (tmp_path / "export").exists()


def test_an_assignment_of_another_network_is_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in make_network().state_dict().items() if name != "3.weight"}
    with pytest.raises(NetworkError, match=r"lacks layers of the assignment: 3\.weight"):
        export_network(tmp_path / "export", state, make_document(), SNIPPET)
    with pytest.raises(StoreError, match="not an assignment"):
        export_network(tmp_path / "export", state, {"bits": {}}, SNIPPET)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), r"the network has no 3\.bias, 3\.weight"),
        (nn.Sequential(*make_network(), nn.Linear(5, 5)), r"the file lacks 4\.bias, 4\.weight"),
        (
            nn.Sequential(*make_network()[:3], nn.Linear(16, 6)),
            r"3\.weight \(\(5, 16\) float32 in the file, \(6, 16\) float32 in the network\)",
        ),
        (make_network().half(), r"0\.weight \(\(4, 3, 3, 3\) float32 in the file, \(4, 3, 3, 3\) float16"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_by_name_and_untouched(tmp_path: Path, network: nn.Module, message: str) -> None:
    export(tmp_path, seed=5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(NetworkError, match=message):
        load_network(tmp_path, network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_truncated_or_absent_file_is_refused(tmp_path: Path) -> None:
    export(tmp_path)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(StoreError, match="is not an export"):
        load_network(tmp_path, make_network())
    with pytest.raises(StoreError, match="is not an export"):
        load_network(tmp_path / "nowhere", make_network())


def test_files_of_two_exports_are_refused(tmp_path: Path) -> None:
    export(tmp_path / "one", bits=(2, 2))
    export(tmp_path / "two", bits=(4, 4))
    (tmp_path / "one" / "assignment.json").write_bytes((tmp_path / "two" / "assignment.json").read_bytes())
    with pytest.raises(StoreError, match="belong to different exports"):
        load_network(tmp_path / "one", make_network())
