"""The command: what it prints is what the library says, and bad input is one message, no traceback, and nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import clado
from clado.choosing.solvers import solve as solve_program
from clado.data import zoo
from clado.data.sources import load_data
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.run.opened_run import open_run
from clado.settings.loading import load_config, load_run_config, parse_config
from clado.storage.measurement_store import MeasurementStore
from flows.cli import app
from tests.running import BUDGETS, config, copy_of

ZOO = {"source": "zoo", "name": "resnet20_fashion_mnist"}
COMMANDS = ("init", "run", "plan", "solve", "evaluate", "export", "show", "doctor")


@pytest.fixture(autouse=True)
def environment_is_given_back():
    """The command sets environment variables; the next test gets what was there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def call(*arguments, ends: int = 0) -> str:
    """Runs the command in this process; what it printed on both streams."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == ends, result.output
    return result.output


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current folder of its own, and a home without Prefect's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(here: Path, **changes) -> Path:
    """The reduced configuration as a file; the run's folder is named after the settings."""
    document = {**config(here), **changes}
    del document["tracking"]
    if document["folder"] == str(here):
        del document["folder"]
    (here / "clado.yaml").write_text(yaml.safe_dump(document))
    return here / "clado.yaml"


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS]], ids=lambda c: c[0] if c else "clado")
def test_help_says_what_there_is(command):
    text = call(*command, "--help")
    assert "Usage" in text
    if not command:
        assert all(name in text for name in COMMANDS)


def test_init_writes_a_configuration_that_is_the_default(here):
    assert "clado run" in call("init")
    document = yaml.safe_load((here / "clado.yaml").read_text())
    assert parse_config(document) == parse_config({"network": document["network"]})
    assert document["network"] == {"source": "zoo", "name": "resnet20_fashion_mnist"}


def with_factory(here: Path) -> str:
    """Writes a module, and names its factory."""
    (here / "models_of_init.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(1, 1)\n")
    return "models_of_init:make"


@pytest.mark.parametrize(("folders", "expected"), [(("",), (15, 30, 15)), (("train", "val"), (40, 80, 16))])
def test_init_takes_a_network_and_a_folder_and_writes_sizes_that_fit(here, folders, expected):
    for folder in folders:
        for k in range(120):
            file = here / "photos" / folder / f"class{k % 2}" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()  # only names are read
    call("init", "--network", with_factory(here), "--data", here / "photos", "-o", "mine.yaml")
    document = yaml.safe_load((here / "mine.yaml").read_text())
    assert document["network"] == {"source": "factory", "name": "models_of_init:make"}
    assert (document["data"]["source"], document["data"]["path"]) == ("folder", str(here / "photos"))
    data = parse_config(document).data
    assert (data.sensitivity_images, data.calibration_images, data.sample_blocks) == expected
    cut_slices = load_data(data, (3, 8, 8))
    assert min(len(cut_slices.calibration), len(cut_slices.sensitivity), len(cut_slices.validation)) > 0


def test_init_refuses_a_factory_or_images_that_are_not_there(here):
    (here / "few").mkdir()
    (here / "few" / "0.png").touch()
    factory = with_factory(here)
    assert "has no function 'build'" in call("init", "--network", "models_of_init:build", "--data", here / "few", ends=2)
    assert "no module 'nowhere'" in call("init", "--network", "nowhere:make", "--data", here / "few", ends=2)
    assert "expected 16 or more" in call("init", "--network", factory, "--data", here / "few", ends=2)
    assert "is not a folder" in call("init", "--network", factory, "--data", here / "nowhere", ends=2)
    assert not (here / "clado.yaml").exists()


def test_init_never_overwrites(here):
    (here / "clado.yaml").write_text("mine")
    before = listing(here)
    assert "exists already" in call("init", ends=2)
    assert listing(here) == before


# what is wrong -> (the settings that are other than the reduced ones, what the message says)
SETTINGS = {
    "unknown key": ({"estimator": ["pairwise"]}, ["unknown key 'estimator'", "did you mean 'estimators'"]),
    "unknown key inside": ({"data": {"sensitivity_image": 8}}, ["data.sensitivity_image", "did you mean 'sensitivity_images'"]),
    "unknown estimator": ({"estimators": ["pairwize"]}, ["layerwise", "gauss_newton", "did you mean 'pairwise'"]),
    "unknown solver": ({"solver": {"name": "scipp"}}, ["exhaustive", "greedy", "did you mean 'scip'"]),
    "unknown quantizer": ({"quantizer": {"weights": "mean"}}, ["minmax", "mse"]),
    "unknown cluster": ({"cluster": {"kind": "locale"}}, ["inline", "did you mean 'local'"]),
    "unknown criterion": ({"criterion": "kl"}, ["kl_to_float", "cross_entropy"]),
    "unknown network": ({"network": {"source": "zoo", "name": "resnet21"}}, ["resnet20_fashion_mnist"]),
    "bits of 0": ({"bits": [0, 4]}, ["1", "16"]),
    "bits of 17": ({"bits": [2, 17]}, ["1", "16"]),
    "bits that descend": ({"bits": [4, 2]}, ["ascending"]),
    "no budget": ({"budgets": {"average_bits": []}}, ["no budget"]),
    "a budget of 0 bits": ({"budgets": {"average_bits": [0]}}, ["budgets.average_bits"]),
    "no estimator": ({"estimators": []}, ["estimators is empty"]),
    "no images": ({"data": {"sensitivity_images": 0}}, ["sensitivity_images"]),
}


@pytest.mark.parametrize(("changes", "said"), SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("command", ["run", "plan"])
def test_settings_that_are_wrong_are_refused(here, command, changes, said):
    write(here, **changes)
    before = listing(here)
    text = call(command, "clado.yaml", ends=2)
    assert all(part in text for part in said), text
    assert listing(here) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("network: [", "is not YAML"), ("", "holds no settings"), ("- 1", "holds no settings"),
     ("bits: [2]", "'network' is missing")],
)  # fmt: skip
def test_files_that_are_no_configuration_are_refused(here, content, said):
    if content is not None:
        (here / "clado.yaml").write_text(content)
    before = listing(here)
    assert said in call("run", "clado.yaml", ends=2)
    assert listing(here) == before


def test_an_override_wins_and_a_wrong_one_is_refused(here):
    write(here)
    before = listing(here)
    assert "did you mean 'seed'" in call("run", "clado.yaml", "data.sed=1", ends=2)
    assert "KEY=VALUE" in call("run", "clado.yaml", "seed", ends=2)
    assert "expected one of" in call("run", "clado.yaml", "estimators=[pair]", ends=2)
    assert listing(here) == before


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(zoo.ZOO / "resnet20_fashion_mnist.safetensors")


def weights_file(here: Path, state: dict) -> dict:
    save_file(state, here / "w.safetensors")
    return {"network": {**ZOO, "weights": "w.safetensors"}}


def image_folder(here: Path, classes: int = 0) -> dict:
    """A folder of images with more classes than the network has outputs, or empty."""
    from PIL import Image

    for k in range(classes):
        (here / "photos" / f"{k:02}").mkdir(parents=True)
        for n in range(8):
            pixels = np.random.default_rng(100 * k + n).integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "photos" / f"{k:02}" / f"{n}.png")
    (here / "photos").mkdir(exist_ok=True)
    settings = {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 0, "validation_images": 60}
    return {"data": {"source": "folder", "path": "photos", "mean": [0.5], "std": [0.5], **settings}, "corrections": []}


def with_state(change):
    def make(here: Path, state: dict) -> dict:
        return weights_file(here, change({name: tensor.clone() for name, tensor in state.items()}))

    return make


def nan(state: dict) -> dict:
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    return state


def infinite(state: dict) -> dict:
    state["fc.bias"][3] = float("inf")
    return state


FILES = {
    "a key too few": (with_state(lambda s: {k: v for k, v in s.items() if k != "fc.weight"}), ["missing fc.weight"]),
    "a key too many": (with_state(lambda s: {**s, "fc2.weight": torch.ones(2)}), ["unexpected fc2.weight"]),
    "another shape": (with_state(lambda s: {**s, "fc.weight": torch.ones(9, 64)}), ["fc.weight is (9, 64)", "(10, 64)"]),
    "a NaN weight": (with_state(nan), ["conv1.weight", "NaN"]),
    "an infinite weight": (with_state(infinite), ["fc.bias", "infinite"]),
    "no weights file": (lambda here, state: {"network": {**ZOO, "weights": "no.safetensors"}},
                        ["no.safetensors does not exist"]),
    "an empty folder of images": (lambda here, state: image_folder(here), ["photos"]),
    "no folder of images": (lambda here, state: {**image_folder(here), "data": {**image_folder(here)["data"], "path": "nowhere"}},
                            ["nowhere"]),
    "labels out of range": (lambda here, state: image_folder(here, 12), ["0..9"]),
    "a size below the smallest": (lambda here, state: {"budgets": {"size_bytes": [1000]}},
                                  ["smallest", "67,652 to 135,304 bytes"]),
    "bits below the smallest": (lambda here, state: {"budgets": {"average_bits": [3, 1.5]}},
                                ["budget 1.5 bits", "smallest", "2 to 4 bits a weight"]),
    "more images than there are": (lambda here, state: {"data": {"sensitivity_images": 2000}}, ["2000", "1024"]),
    "a pattern that matches nothing": (lambda here, state: {"network": {**ZOO, "fixed": ["cnv*"]}},
                                       ["cnv*"]),
    "a run folder that is a file": (lambda here, state: {"folder": "clado.yaml"}, ["clado.yaml is a file"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), FILES.values(), ids=list(FILES))
def test_weights_data_and_budgets_that_do_not_fit_are_refused_before_anything_is_written(here, state, make, said):
    write(here, **make(here, state))
    before = listing(here)
    text = call("run", "clado.yaml", ends=2)
    assert text.startswith("clado: ")
    assert all(part in text for part in said), text
    assert listing(here) == before


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A finished run in a folder of its own."""
    return Path(copy_of(finished, tmp_path / "runs" / "copied")["folder"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("quantizer.weights=minmax", "quantizer.weights: the store has 'mse', this run 'minmax'"),
        ("data.seed=1", "sensitivity_set"),
        ("bits=[2,8]", "bits: the store has [2, 4], this run [2, 8]"),
        ("data.sample_blocks=8", "blocks: the store has 4 entries, this run 8"),
    ],
)
def test_a_store_of_other_settings_is_refused_and_left_alone(here, finished, copied, change, said):
    write(here, folder=str(copied))
    before = listing(here)
    text = call("run", "clado.yaml", change, ends=2)
    assert said in text
    assert "another folder" in text
    assert listing(here) == before


def test_a_store_that_is_not_ours_is_refused_and_left_alone(here):
    (here / "runs" / "mine" / "store.zarr").mkdir(parents=True)
    write(here, folder="runs/mine")
    before = listing(here)
    assert "is not a store of clado" in call("run", "clado.yaml", ends=2)
    assert listing(here) == before


def test_a_run_that_another_process_holds_is_refused(here, copied):
    from flows.guard import locked

    write(here, folder=str(copied))
    with locked(copied):
        assert "another run is writing" in call("run", "clado.yaml", ends=2)


@pytest.mark.parametrize("command", ["solve", "evaluate", "export", "show"])
def test_a_folder_that_is_no_run_is_refused(here, command):
    (here / "empty").mkdir()
    before = listing(here)
    budget = ["--budget", 3] if command in ("solve", "export") else []
    for folder in ("empty", "nowhere"):
        assert "is not the" in call(command, folder, *budget, ends=2)
    assert listing(here) == before


def test_plan_prints_the_plans_own_numbers_and_writes_nothing(here):
    file = write(here)
    before = listing(here)
    text = call("plan", file)
    run = open_run(parse_config(yaml.safe_load(file.read_text())))
    plan, space = run.plan, run.space
    k, n = space.num_options, 16  # half of the sensitivity images measure
    pairs = sum(2 * 2 for i in range(22) for j in range(i + 1, 22))  # by hand: two widths a layer
    for evaluations in (pairs, 1 + k):
        assert f"{evaluations:,} evaluations" in text
        assert f"{evaluations * n:,} forward images" in text
    assert f"{plan.stored_bytes() / 1e6:,.1f} MB" in text
    weights = sum(layer.num_weights for layer in space.layers)
    assert f"{weights * 2 // 8:,} to {weights * 4 // 8:,} bytes" in text
    assert f"{len([t for t in plan.tiles if t.kind == 'pairs'])} tiles" in text
    assert "GMAC: " in text  # words that a newcomer does not know are explained
    assert listing(here) == before


def test_plan_names_what_stays_in_float(here):
    text = call("plan", write(here, network={**ZOO, "fixed": ["layer1.*", "fc.weight"]}))
    others, fixed = sorted((line for line in text.splitlines() if "stays in float" in line), key=lambda line: "(fixed" in line)
    assert "layer1.0.conv1.weight" in fixed
    assert fixed.endswith("fc.weight")
    assert "one value a channel" in others
    assert others.endswith("more")


def test_plan_refuses_a_budget_out_of_reach(here):
    text = call("plan", write(here, budgets={"average_bits": [3, 1.5]}), ends=2)
    assert "budget 1.5 bits" in text
    assert "2 to 4 bits a weight" in text


def test_plan_with_a_probe_adds_an_eta_within_its_limit(here):
    file = write(here)
    before, begin = listing(here), time.monotonic()
    text = call("plan", file, "--probe")
    assert re.search(r"ETA: about \d+ s: .* preparing \d+, measuring \d+, evaluation \d+", text)
    assert time.monotonic() - begin < 120
    assert listing(here) == before


@pytest.mark.parametrize("details", [(), ("--details",)])
def test_show_prints_the_table_the_verdict_and_the_places(finished, details):
    text = call("show", finished.folder, *details)
    record = RunRecord.load(finished.folder / "record.json")
    for result in record.results:
        assert f"{100 * result.validation.top1:.2f}" in text
    assert "Interactions" in text
    assert str(finished.folder / "report.html") in text.replace("\n", "")
    assert ("Seconds: " in text) == bool(details)


def test_what_a_run_found_fits_on_a_screen_and_begins_with_it(finished):
    lines = call("show", finished.folder).splitlines()
    record = RunRecord.load(finished.folder / "record.json")
    assert len(lines) <= 24 + 2 * len(record.budgets)
    for line, budget in zip(lines[1:], record.budgets, strict=False):
        chosen, drop = record.find(budget, CHOSEN), record.comparison(budget, CHOSEN, "float").top1
        assert f"{100 * record.float_accuracy.top1:.2f} → {100 * chosen.validation.top1:.2f} %" in line
        assert f"({100 * drop.mean:+.2f} ± {50 * (drop.high - drop.low):.2f} points, {drop.num_images} images)" in line
    assert any(line.startswith("Recommended: ") for line in lines)
    assert lines[-1].startswith(f"Next: clado export {finished.folder}")


def test_the_version_is_printed():
    assert call("--version").strip() == f"clado {clado.__version__}"


def test_a_further_limit_may_be_the_only_one(copied):
    from flows.commands.stored import StoredRun

    text = call("solve", copied, "--limit", "size=90000")
    assert "Proven" in text
    files = {path.name for path in (copied / "solutions").iterdir()}
    assert {f"90_kB-{name}.json" for name in StoredRun.open(copied).matrices.named} <= files


def ends_with_advice(text, folder):
    """One recommendation, then the next command."""
    *_, recommended, following = text.splitlines()
    return recommended.startswith("Recommended: ") and following.startswith(f"Next: clado evaluate {folder} --size-bytes ")


def test_what_measures_nothing_ends_with_one_recommendation_and_the_next_command(copied):
    record = RunRecord.load(copied / "record.json")
    assert ends_with_advice(call("solve", copied, "--budget", 3), copied)
    assert ends_with_advice(call("smallest", copied, "--max-predicted-increase", 0.05), copied)
    assert ends_with_advice(call("score", copied, copied / "solutions" / "3_bits-layerwise.json"), copied)
    won = {row.winner.split()[0].strip(",") for row in record.results if row.method == CHOSEN}
    [recommended] = re.findall(r"Recommended: the answer of (\w+)", call("solve", copied, "--limit", "size=90000"))
    assert recommended in won or (recommended == "layerwise" and not won & set(record.methods))


def test_an_assignment_that_has_a_better_one_of_its_size_is_told_so(copied):
    call("solve", copied, "--budget", 3)
    best = json.loads((copied / "solutions" / "3_bits-layerwise.json").read_text())
    bits = {name: 6 - bits for name, bits in best["bits"].items()}  # 2 for 4, and 4 for 2
    (copied / "turned.json").write_text(json.dumps(bits))
    assert "Recommended: the answer of" in call("score", copied, copied / "turned.json")


def test_a_budget_out_of_reach_is_refused_in_the_unit_that_was_typed(copied):
    told = call("solve", copied, "--budget", 1, ends=2)
    assert "the bound 1 average bits a weight is below the smallest reachable; reachable are 2 to 4" in told


def test_answers_are_evaluated_on_a_part_of_the_images(copied):
    call("evaluate", copied)
    before = listing(copied / "evaluations")
    text = call("evaluate", copied, "--images", 16)
    record = RunRecord.load(copied / "record.json")
    assert all(f"| {budget}" in text for budget in record.budgets)
    hits = [0.16 * float(line.split("|")[6]) for line in text.splitlines()[2:] if line.startswith("|")]
    assert [round(count) for count in hits] == pytest.approx(hits, abs=0.01)  # whole images of 16
    assert listing(copied / "evaluations") == before
    assert "expected at most these" in call("evaluate", copied, "--images", 10**6, ends=2)


def test_solve_equals_solving_the_stored_matrix(finished, copied):
    from clado.choosing.proposals import Budget, program_of
    from flows.commands.stored import StoredRun

    before = listing(copied / "store.zarr")
    text = call("solve", copied, "--budget", 2.75)
    stored = StoredRun.open(copied)
    for name, matrix in stored.matrices.named.items():
        limit = Budget("average_bits", 2.75).limit(matrix.space)
        optimum = solve_program(program_of(matrix, [limit]), "scip", time_limit=60)
        document = json.loads((copied / "solutions" / f"2.75_bits-{name}.json").read_text())
        assert matrix.predicted_increase(matrix.space.from_json(document)) == pytest.approx(optimum.objective, rel=1e-5)
        assert document["average_bits"] <= 2.75
        assert document["status"] == "optimal"
        assert f"{name}: optimal" in text
    assert listing(copied / "store.zarr") == before


def test_an_answer_within_further_limits_is_kept_beside_the_one_without(finished, copied):
    call("solve", copied, "--budget", 3)
    before = {path.name: path.read_bytes() for path in (copied / "solutions").iterdir()}
    call("solve", copied, "--budget", 3, "--limit", "size=90000")
    after = {path.name: path.read_bytes() for path in (copied / "solutions").iterdir()}
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before
    document = json.loads(after["3_bits-size_90000-layerwise.json"])
    assert (document["budget"], document["limits"]) == ("3 bits", ["size=90000"])


@pytest.mark.parametrize("content", ["layer,bits,µs\n".encode("latin-1"), "layer,bits,s\n".encode("utf-16")])
def test_a_table_that_is_not_utf8_is_refused(finished, tmp_path, content):
    (tmp_path / "times.csv").write_bytes(content)
    limit = f"latency=1:{tmp_path / 'times.csv'}"
    assert "not a CSV file in UTF-8" in call("solve", finished.folder, "--budget", 3, "--limit", limit, ends=2)


def test_a_folder_may_have_any_letters_and_a_terminal_any_encoding(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "é😀" / "run")
    assert "optimal" in call("solve", folder, "--budget", 3)
    for encoding in ("latin-1", "ascii"):
        command = [sys.executable, "-c", "from flows.cli import main; main()", "show", str(folder), "--proposals"]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        shown = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert b"chosen" in shown.stdout
        assert not shown.stderr


def test_what_was_killed_before_its_record_says_so_and_is_not_called_delivered(copied):
    (copied / "record.json").unlink()
    assert "has no record yet" in call("sync", copied, ends=2)
    before = set(listing(copied))
    assert "record.json" in call("sweep", copied, "--budgets", 2, ends=2)
    assert set(listing(copied)) == before  # no front, and nothing measured for one


def test_plan_says_what_of_a_grown_run_is_there_already(here, finished, copied):
    write(here, folder=str(copied))
    assert "in the store already: 100 % of the evaluations" in call("plan", "clado.yaml")
    # half of everything but the losses of uncorrected layers: a quarter of eight blocks is two, and so is that of four, at least
    assert "in the store already: 51 % of the evaluations" in call("plan", "clado.yaml", "data.sensitivity_images=64")


def test_paths_may_begin_at_home(here):
    write(here, folder="~/runs/mine", network={**ZOO, "weights": "~/w.safetensors"})
    settings = load_config(here / "clado.yaml")
    assert settings.run_folder == here / "runs" / "mine"
    assert settings.network.weights == here / "w.safetensors"


def test_a_folder_that_is_not_there_is_named_with_where_it_was_looked_for(here):
    write(here, data={"source": "folder", "path": "photos"})
    assert f"data.path photos (in {here}) is not a folder" in call("run", "clado.yaml", ends=2)


@pytest.mark.parametrize("budget", [[], ["--budget", 3, "--size-bytes", 90000]])
@pytest.mark.parametrize("command", ["solve", "export"])
def test_one_budget_has_to_be_named(finished, command, budget):
    assert "name one budget" in call(command, finished.folder, *budget, ends=2)


def test_an_impossible_budget_names_the_smallest_size(finished, copied):
    smallest = open_run(parse_config(finished.document)).space
    text = call("solve", copied, "--size-bytes", 1000, ends=2)
    assert f"{smallest.size_bytes(smallest.narrowest):,}" in text or str(smallest.size_bytes(smallest.narrowest)) in text


def runs_of(folder):
    from mlflow import MlflowClient

    client = MlflowClient(load_run_config(folder).tracking.uri)
    return [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])]


def test_evaluate_prints_what_the_run_recorded_and_computes_nothing(finished, copied):
    before = listing(copied / "evaluations")
    text = call("evaluate", copied)
    record = RunRecord.load(copied / "record.json")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:] if line.startswith("|")]
    assert len(rows) == len(record.results)
    for row in rows:
        result = record.find(row[0], row[1])
        low, high = (f"{100 * end:.2f}" for end in result.validation.top1_interval)
        assert row[2:] == [
            f"{result.size_bytes:,}", f"{result.average_bits:.3f}", f"{result.loss_deployed:.4f}",
            f"{100 * result.validation.top1:.2f}", f"{low} to {high}",
            f"{100 * result.validation.top5:.2f}", f"{result.validation.loss:.4f}",
        ]  # fmt: skip
    assert listing(copied / "evaluations") == before


def test_evaluate_of_a_new_budget_measures_what_is_new_once(finished, copied):
    count = len(list((copied / "evaluations" / "validation").iterdir()))
    text = call("evaluate", copied, "--budget", 3.25)
    assert {line.split("|")[1].strip() for line in text.splitlines()[2:] if line.startswith("|")} == {"3.25 bits"}
    after = listing(copied / "evaluations")
    assert len(list((copied / "evaluations" / "validation").iterdir())) > count
    again, ran = call("evaluate", copied, "--budget", 3.25), "\nMLflow run "
    assert again.partition(ran)[0] == text.partition(ran)[0]
    assert [run.info.run_name for run in runs_of(copied)].count("3.25 bits evaluated") == 1
    assert listing(copied / "evaluations") == after


def test_a_peers_file_says_what_it_keeps_with_the_accuracies(finished, copied, tmp_path):
    record = RunRecord.load(finished.folder / "record.json")
    measured = f"top-1 {100 * record.find(record.budgets[0], CHOSEN).validation.top1:.2f} %"
    for peer in ("torchao", "mct"):
        told = call("export", copied, "--budget", BUDGETS[0], "--format", peer, "-o", tmp_path / peer)
        text = (tmp_path / peer / f"assignment_{peer}.py").read_text().partition('"""')[0]
        assert all(measured in words and (peer == "mct") == ("WARNING" in words) for words in (told, text)), told
        carries = (tmp_path / peer / f"weights_{peer}.safetensors").is_file()
        assert carries == (peer == "torchao")
    [emulated] = re.findall(r"As MCT rounds, emulated: top-1 (\S+) %", told)
    assert float(emulated) < 100 * record.find(record.budgets[0], CHOSEN).validation.top1


@pytest.mark.parametrize("bits", BUDGETS)
def test_export_of_a_budget_of_the_run_is_what_the_run_exported(finished, copied, tmp_path, bits):
    call("export", copied, "--budget", bits, "--output", tmp_path / "out")
    exported_by_run = finished.folder / "exports" / f"{bits:g}_bits"
    for name in ("assignment.json", "README.md"):
        assert (tmp_path / "out" / name).read_text() == (exported_by_run / name).read_text()
    one, other = (load_file(folder / "weights.safetensors") for folder in (exported_by_run, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    chosen = RunRecord.load(copied / "record.json").find(f"{bits:g} bits", CHOSEN)
    assert list(json.loads((exported_by_run / "assignment.json").read_text())["bits"].values()) == list(chosen.assignment.bits)


def test_a_server_that_prefects_profile_names_is_known(here, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    (here / ".prefect").mkdir()
    for active, expected in (("far", "http://127.0.0.1:9/api: does not answer"), ("near", "not set: an embedded server")):
        profiles = '[profiles.far]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n[profiles.near]\n'
        (here / ".prefect" / "profiles.toml").write_text(f'active = "{active}"\n{profiles}')
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        assert expected in call("doctor", ends=int(active == "far"))


def test_doctor_names_versions_and_a_server_that_does_not_answer(monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    text = call("doctor")
    assert version("torch") in text
    assert "embedded" in text
    monkeypatch.setenv("PREFECT_API_URL", "http://user:secret@127.0.0.1:9/api")
    text = call("doctor", ends=1)
    assert "does not answer" in text
    assert "secret" not in text


@contextmanager
def server(password: str | None) -> Iterator[int]:
    """Answers 200 to who knows the password, else 401; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = password is None or self.headers.get("Authorization") == f"Basic {b64encode(password.encode()).decode()}"
            self.send_response(200 if known else 401)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running.server_port
        finally:
            running.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("uri", "ends", "said"),
    [
        ("http://127.0.0.1:PORT", 1, "does not answer (HTTP Error 401"),
        ("http://user:hunter2@127.0.0.1:PORT", 0, "answers (200)"),
        ("http://user:hunter3@127.0.0.1:PORT", 1, "does not answer (HTTP Error 401"),
        ("http://user:hunter2@127.0.0.1:none", 1, "does not answer"),
        ("sqlite:////tmp/some.db", 0, "sqlite:////tmp/some.db: no server to ask"),
    ],
)
def test_doctor_asks_servers_as_they_want_to_be_asked_and_shows_no_password(monkeypatch, uri, ends, said):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with server("user:hunter2") as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("PORT", str(port)))
        text = call("doctor", ends=ends)
    assert said in text
    assert "hunter" not in text


@pytest.mark.parametrize("command", ["evaluate", "export", "finetune", "sweep", "smallest"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 5}, "was measured under other settings"),
        ({"sensitivity_images": 40}, "ask for more images than were measured"),
    ],
)
def test_a_finished_run_whose_settings_changed_since_is_not_mixed_with_its_old_measurements(
    command, changed, said, finished, tmp_path
):
    shutil.copytree(finished.folder, tmp_path / "run")
    document = {**finished.document, "folder": str(tmp_path / "run"), "data": {**finished.document["data"], **changed}}
    (tmp_path / "run" / "config.yaml").write_text(parse_config(document).to_yaml())
    before = listing(tmp_path / "run")
    options = {"sweep": ["--budgets", "3"], "smallest": ["--max-loss-increase", "1"]}.get(command, ["--budget", "3"])
    assert said in " ".join(call(command, tmp_path / "run", *options, ends=2).split())
    assert listing(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["solve", "--budget", "nan"], "--budget is nan; expected a number"),
        (["export", "--budget", "inf"], "--budget is inf; expected a number"),
        (["evaluate", "--budget", "-3"], "--budget is -3.0; expected a number"),
        (["solve", "--budget", "3", "--limit", "latency=0.002"], "needs path"),
        (["smallest", "--max-top1-drop", "nan"], "name one bound, a number"),
        (["finetune", "--budget", "3", "--seed", "-1"], "--seed"),
    ],
)
def test_a_number_that_is_none_is_refused_with_what_was_expected(arguments, said, finished):
    command, *rest = arguments
    assert said in " ".join(call(command, finished.folder, *rest, ends=2).replace("│", "").split())


SPIED = """
import sys
from flows.cli import main
sys.argv[1:] = ["run", "clado.yaml"]
try:
    main()
finally:
    print("LOADED", *sorted({"torch", "numpy", "prefect", "zarr", "mlflow", "distributed"} & set(sys.modules)))
"""


@pytest.mark.parametrize("changes", [{"estimators": ["pairwize"]}, {"bits": [2, 17]}], ids=["estimator", "bits"])
def test_wrong_settings_are_refused_before_torch_is_imported(here, changes):
    write(here, **changes)
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", SPIED], check=False, capture_output=True, text=True, timeout=60, cwd=here)
    assert result.returncode == 2
    assert result.stdout.strip() == "LOADED"
    assert result.stderr.startswith("clado: ")
    assert "Traceback" not in result.stderr
    assert time.monotonic() - begin < 30  # a busy machine


def test_the_installed_command_answers_help():
    command = Path(sys.executable).with_name("clado")
    result = subprocess.run([command, "--help"], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/api"], ids=["embedded", "by address"])
def test_a_prefect_that_does_not_start_is_one_message(here, monkeypatch, url):
    import flows.pipeline

    def refuses(document, clock):
        raise RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")

    monkeypatch.setattr(flows.pipeline, "pipeline", refuses)
    if url:
        monkeypatch.setenv("PREFECT_API_URL", url)
    else:
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
    text = call("run", write(here), ends=2)
    assert "Prefect did not start (RuntimeError: Timed out" in text
    assert (url or "prefect server start") in text
    assert not list(here.rglob("store.zarr"))


def test_a_fault_inside_the_flow_is_not_taken_for_prefects(here, monkeypatch):
    import flows.pipeline

    def broken(document, clock):
        clock["measuring"] = 1.0
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(flows.pipeline, "pipeline", broken)
    with pytest.raises(ZeroDivisionError):
        call("run", write(here))


def test_the_store_of_the_finished_run_is_whole(finished):
    run = open_run(parse_config(finished.document))
    assert MeasurementStore.open(finished.folder / "store.zarr").missing(run.plan) == []


def test_cluster_prints_what_would_be_started(here):
    document = config(here / "run", cluster={"kind": "kubernetes", "workers": 3, "kubernetes": {"image": "clado:0.1.0"}})
    (here / "clado.yaml").write_text(yaml.safe_dump(document))
    manifest = json.loads(call("cluster", "clado.yaml"))
    assert manifest["kind"] == "DaskCluster"
    assert manifest["spec"]["worker"]["replicas"] == 3
    assert "worker" in call("cluster", "clado.yaml", "cluster.kind=local")
    assert sorted(path.name for path in here.iterdir()) == ["clado.yaml"]


def test_certificates_are_written_once_and_nobody_else_may_read_the_key(here):
    printed = call("certificates", "tls", "--host", "node1")
    assert "cluster: {tls: {ca_file: tls/ca.pem, cert: tls/cert.pem, key: tls/key.pem}}" in printed
    assert (here / "tls" / "key.pem").stat().st_mode & 0o077 == 0
    before = listing(here)
    assert "'münchen' is not the name of a machine" in call("certificates", "other", "--host", "münchen", ends=2)
    call("certificates", "other", "--days", 99999999, ends=2)
    assert "exists already" in call("certificates", "tls", ends=2)
    assert listing(here) == before
