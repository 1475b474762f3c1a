"""From the table to the clock: a run that names a runtime searches what it runs, and measures there what was chosen."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from clado.errors import ConfigurationError, NetworkError
from clado.exporting.native import lacking_options, native_space
from clado.exporting.runtimes.onnxruntime import runtime
from clado.records.run_record import RunRecord
from clado.reporting import summary, tables
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.space import Layer, SearchSpace
from clado.tracking.metrics import child_metrics, parent_metrics
from flows.commands.plan import plan_text
from flows.phases.serve import serve
from tests.contracts.runtime import inverted
from tests.running import config, run_pipeline

NATIVE = {"name": "onnxruntime", "candidates": "native"}
LAYERS = (
    Layer("stem.weight", (8, 3, 3, 3), "conv2d"),
    Layer("point.weight", (8, 8, 1, 1), "conv2d"),
    Layer("up.weight", (8, 8, 2, 2), "conv_transpose2d"),
    Layer("fc.weight", (10, 8), "linear"),
)
SPACE = SearchSpace.uniform(LAYERS, (3, 4, 8))


def test_what_has_no_kernel_is_left_out_and_a_layer_without_any_stays_in_float():
    assert native_space(SPACE, runtime, True).bit_widths == ((None,), (4, 8), (None,), (4, 8))
    inputs = native_space(SPACE.with_activations([4, 8]), runtime, True)
    assert (inputs.bit_widths, inputs.activation_widths) == (((4, 8), (4, 8), (None,), (4, 8)), (8,))
    for space in (native_space(SPACE, runtime, False), inputs):
        assert lacking_options(space, runtime, True) == {}
    assert native_space(inputs, runtime, True) == inputs


def test_float_stays_a_candidate_and_tied_layers_have_what_all_of_them_run():
    space = SPACE.restricted({"*": [4, 8, "float"]}).tied([["stem*", "point*"]])
    assert native_space(space, runtime, True).bit_widths == ((None,), (None,), (None,), (4, 8, None))


def test_where_nothing_is_native_the_reasons_are_said():
    with pytest.raises(
        ConfigurationError, match="natively: 6 options: int8 kernels need the symmetric scheme; 3 options: 3 bits"
    ):
        native_space(SPACE.with_activations([8]), runtime, False)


def network() -> nn.Module:
    """The network of the runtimes' contract."""
    return inverted()[0].model


def pictures() -> tuple[Tensor, Tensor]:
    """Images for the network of the runtimes' contract, and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(120, 1, 12, 12, generator=generator), torch.randint(10, (120,), generator=generator)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of a small network."""
    return config(
        folder,
        network={"source": "factory", "name": f"{__name__}:network", "image_shape": [1, 12, 12]},
        data={
            "source": "factory",
            "factory": f"{__name__}:pictures",
            "sensitivity_images": 16,
            "sample_blocks": 2,
            "calibration_images": 32,
            "validation_images": 40,
        },
        corrections=["output_statistics"],
        estimators=["layerwise"],
        search={"evaluations": 0},
        tracking={"uri": f"sqlite:///{folder.parent / 'mlflow.db'}", "models": False},
        **changes,
    )


def test_a_latency_budget_needs_a_runtime_and_the_times_of_its_layers(tmp_path):
    document = settings(tmp_path / "run", budgets={"latency": [0.002]})
    with pytest.raises(ConfigurationError, match=r"needs a runtime; expected runtime: \{name: onnxruntime\}"):
        parse_config(document)
    run = open_run(parse_config({**document, "runtime": {}}))
    assert [budget.name for budget in run.budgets] == ["2 ms"]
    with pytest.raises(ConfigurationError, match=r"onnxruntime\.csv is no file; expected .* as `clado profile CONFIG` writes"):
        run.budgets[0].limit(run.space)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[OpenedRun, RunRecord]:
    """A run from latency to milliseconds, with layers that may stay in float. Its table is made up: seconds are bits."""
    folder = tmp_path_factory.mktemp("served") / "run"
    document = settings(
        folder,
        bits=[3, 4, "float"],
        layers={"bits": {"stem.weight": ["float"], "head.*": [4]}},
        activations={"bits": [4, 8]},
        budgets={"latency": [0.1, 1.0]},
        runtime={**NATIVE, "images": 33, "table": str(folder.parent / "times.csv")},
    )
    run = open_run(parse_config(document))
    rows = [
        f"{run.space.layers[i].name},{bits or 'float'},{width or ''},{(bits or 32) / 1000}"
        for i, bits, width in run.space.options
    ]
    (folder.parent / "times.csv").write_text("\n".join(["layer,bits,activation_bits,seconds", *rows]))
    run_pipeline(document, tracked=False)
    return run, RunRecord.load(folder / "record.json")


def test_only_what_the_runtime_runs_is_searched_and_that_is_said_before_the_run_and_in_its_record(served):
    run, record = served
    assert run.space.activation_widths == (8,)
    assert {bits for widths in run.space.bit_widths for bits in widths} == {4, None}
    said = r"ONNX Runtime does not run \d+ of \d+ options natively \(.*3 bits have no type.*\); they are left out"
    assert re.search(said, plan_text(run))
    assert any(re.fullmatch(said, note) for note in record.notes)
    other = {**run.config.model_dump(mode="json"), "runtime": None, "budgets": {"average_bits": [4]}, "folder": None}
    folders = [parse_config({**other, "runtime": one}).run_folder for one in (None, {}, NATIVE)]
    assert folders[0] == folders[1] != folders[2]  # it changes what is measured


def test_the_chosen_networks_are_timed_and_counted_in_the_runtime(served):
    run, record = served
    serving = record.serving
    assert [network.name for network in serving.networks] == ["100 ms", "1000 ms", "float", "uniform 4 bits"]
    assert (serving.num_images, serving.has_labels, serving.threads) == (33, True, 1)
    for budget in run.budgets:
        chosen, network = record.find(budget.name, "chosen"), serving.find(budget.name)
        assert network.predicted_milliseconds == pytest.approx(1000 * budget.limit(run.space).value(run.space, chosen.assignment))
        assert network.predicted_milliseconds <= 1000 * budget.bound
        assert abs(network.top1 - chosen.validation.top1) <= 0.3  # of 33 and of 40 images
    assert all(network.milliseconds > 0 and network.file_bytes > 0 for network in serving.networks)
    assert serving.find("100 ms").file_bytes < serving.find("1000 ms").file_bytes < 1.1 * serving.find("float").file_bytes
    assert record.find("1000 ms", "chosen").assignment.bits == (None, None, None, None, 4)
    assert record.find("100 ms", "layerwise").assignment.bits.count(None) == 2


def test_what_was_measured_there_is_in_table_report_and_mlflow(served):
    run, record = served
    row = record.serving.find("100 ms")
    for text in ((run.folder / "table.md").read_text(), (run.folder / "report.html").read_text(), _printed(record)):
        for figure in (
            f"{row.file_bytes:,}",
            f"{row.milliseconds:.3f}",
            f"{row.predicted_milliseconds:.3f}",
            "33 validation images",
        ):
            assert figure in text
    metrics = child_metrics(record, record.find("100 ms", "chosen"))
    assert (metrics["runtime_milliseconds"], metrics["runtime_top1"]) == (row.milliseconds, row.top1)
    assert not any(name.startswith("runtime") for name in child_metrics(record, record.find("100 ms", "layerwise")))
    assert parent_metrics(record)["runtime_float_milliseconds"] == record.serving.find("float").milliseconds
    page = (run.folder / "report.html").read_text()
    assert ">float<" in page
    assert all(fault not in page for fault in ("None bits", "None/"))
    assert "in float" in summary.layers_text(record.layer_names, record.find("100 ms", "chosen").assignment)


def test_a_network_that_the_runtime_does_not_take_ends_nothing(served, monkeypatch):
    run, record = served

    def refuse(*arguments: object) -> None:
        raise NetworkError("an operator is missing")

    monkeypatch.setattr("flows.phases.serve.runtime_of", lambda name: replace(runtime, write=refuse))
    assert serve(run, record.results) == (None, ["ONNX Runtime measured nothing: an operator is missing"])


def _printed(record: RunRecord) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(summary.summary(record), tables.show(record))
    return console.file.getvalue()
