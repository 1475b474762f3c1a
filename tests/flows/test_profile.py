"""Times of layers: a table that the constraint reads, whose sums are whole networks; resumed, and never mixed with others."""

import json
import os

import pytest
import yaml
from typer.testing import CliRunner

from clado.choosing.constraints import constraint
from clado.errors import StoreError
from clado.exporting.runtimes import LayerTimes, Runtime
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from flows.cli import app
from flows.commands import profile as profiling
from tests.running import config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> OpenedRun:
    folder = tmp_path_factory.mktemp("profile") / "run"
    return open_run(parse_config(config(folder, bits=[4, 8], layers={"bits": {"fc.weight": [8]}}, corrections=[])))


class Fake:
    """A runtime whose layers take the stated seconds, and which counts its calls."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.profiled = 0
        self.version = "1"

    def runtime(self) -> Runtime:
        def write(path, network, layers, images):
            path.write_text(str(next((int(layer.grid.codes.high).bit_length() + 1 for layer in layers.values()), 32)))
            self.written.append(path.read_text())

        def profile(path, threads, images, names, passes):
            self.profiled += 1
            return LayerTimes({name: float(path.read_text()) for name in names}, 10.0)

        return Runtime(
            title="Fake",
            file="f",
            requirements=(),
            loader="",
            session_entries=lambda path: {},
            lacks_kernel=lambda layer, bits, activation_bits, symmetric: "no four" if bits == 4 else None,
            write=write,
            open=lambda path, threads: lambda images: images,
            profile=profile,
            kernels=lambda path: {},
            code_bytes=lambda path: {},
            versions=lambda: {"fake": self.version},
        )


def test_the_table_is_what_the_constraint_reads_and_sums_to_whole_networks(run, tmp_path):
    fake, path = Fake(), tmp_path / "times.csv"
    timed = profiling.profile(run, "fake", fake.runtime(), path, 1, 1, 3)
    assert fake.written == ["32", "4", "8"]  # float, and each pair of widths
    assert fake.profiled == 9
    space = run.space
    latency = constraint("latency", space, 1.0, path=path)
    assert all(cost > 0 for cost in latency.costs)
    for name, assignment in profiling.networks_of(space).items():
        if name == "8":
            assert latency.value(space, assignment) == pytest.approx(timed.seconds(name), rel=1e-3)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["runtime"], facts["threads"], facts["batch"], facts["versions"]) == ("fake", 1, 1, {"fake": "1"})
    assert facts["cores"] == os.cpu_count()
    assert len(facts["turns"]) == 3


def test_the_rest_of_a_network_does_not_depend_on_the_option():
    """Two layers, and a rest that takes as long in both networks: only the layers' own times tell the options apart."""
    turn = {
        "4": {"seconds": 13.0, "layers": {"a": 1.0, "b": 2.0}, "rest": 10.0},
        "8": {"seconds": 17.0, "layers": {"a": 4.0, "b": 3.0}, "rest": 10.0},
    }
    timed = profiling.Turns("key", {}, [turn])
    narrow, wide = (timed.layer_seconds(name, {"a": 0.5, "b": 0.5}) for name in ("4", "8"))
    assert {name: wide[name] - narrow[name] for name in wide} == {"a": 3.0, "b": 1.0}


def test_what_was_timed_is_not_timed_again_unless_the_machine_or_versions_differ(run, tmp_path):
    fake, path = Fake(), tmp_path / "times.csv"
    profiling.profile(run, "fake", fake.runtime(), path, 1, 1, 1)
    table = path.read_text()
    profiling.profile(run, "fake", fake.runtime(), path, 1, 1, 1)
    assert fake.profiled == 3
    assert path.read_text() == table
    profiling.profile(run, "fake", fake.runtime(), path, 1, 1, 2)
    assert fake.profiled == 6  # one turn more
    fake.version = "2"
    timed = profiling.profile(run, "fake", fake.runtime(), path, 1, 1, 2)
    assert fake.profiled == 12
    assert len(timed.turns) == 2


def test_a_file_of_something_else_is_not_replaced(run, tmp_path):
    (tmp_path / "times.json").write_text("{}")
    with pytest.raises(StoreError, match=r"is no profile .*--output"):
        profiling.profile(run, "fake", Fake().runtime(), tmp_path / "times.csv", 1, 1, 1)
    assert (tmp_path / "times.json").read_text() == "{}"


def test_options_without_a_kernel_are_counted_by_reason(run):
    text = profiling.lacking_text(run, "fake", Fake().runtime())
    four_bits = sum(bits == 4 for _, bits, _ in run.space.options)
    assert f"does not run {four_bits} of {run.space.num_options} options natively" in text
    assert f"{four_bits:>4} options: no four" in text


def test_the_command_times_onnx_runtime(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = config(tmp_path / "run", bits=[8], corrections=[], activations={"bits": [8]})
    (tmp_path / "clado.yaml").write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(app, ["profile", "clado.yaml", "--turns", "1", "-o", "times.csv"])
    assert result.exit_code == 0, result.output
    assert "onnxruntime runs every option natively" in result.output
    assert "medians of 1 turns; onnxruntime" in result.output
    run = open_run(parse_config(document), planning=True)
    assert constraint("latency", run.space, 1.0, path=tmp_path / "times.csv").value(run.space, run.space.widest) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--runtime", "nothing"], "unknown runtime 'nothing'; expected one of onnxruntime"), (["-o", "times.txt"], "a file .csv")],
)
def test_bad_input_is_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clado.yaml").write_text(yaml.safe_dump(config(tmp_path / "run", corrections=[])))
    result = CliRunner().invoke(app, ["profile", "clado.yaml", *arguments])
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
