"""Laws of preparing a run: any order of tasks, any cut by memory and any number of kills give the same files, bit for bit."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clado.errors import StoreError
from clado.quantization.corrections import batchnorm_reestimation
from clado.quantization.preparation import prepare
from clado.run.opened_run import OpenedRun, open_run
from clado.run.preparation import LayerTask, RangesTask, ReferenceTask, SweepTask
from clado.settings.loading import parse_config
from tests.running import config

CHANGES = {
    "weights": {"corrections": ["equalization", "gptq", "output_statistics"]},
    "activations": {"corrections": ["gptq", "output_statistics"], "activations": {"bits": [4, 8]}},
    "ranges alone": {"corrections": [], "activations": {"bits": [8]}},
    "neither": {"corrections": []},
}
CLIPPED = {
    "network": {"source": "zoo", "name": "mobilenetv2_fashion_mnist"},  # it has ReLU6
    "corrections": ["equalization", "batchnorm_reestimation"],
}
ROOT = Path(__file__).parents[2]


def opened(folder: Path, name: str, **changes) -> OpenedRun:
    """A run of 70 calibration images, so that there are four blocks."""
    data = {"sensitivity_images": 32, "sample_blocks": 4, "calibration_images": 70, "validation_images": 100}
    return open_run(parse_config(config(folder, data=data, **{**CHANGES[name], **changes})))


def prepared_by(run: OpenedRun, order: random.Random | None = None) -> dict[str, dict[str, bytes]]:
    """The files of a run once every stage is done, its tasks in any order: name -> tensor -> bytes."""
    run.preparation.equalize()
    for stage in run.preparation.stages():
        for task in sorted(stage, key=lambda _: order.random()) if order else stage:
            run.preparation.do(task)
    run.preparation.clear()
    return contents(run.folder)


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    texts = {}
    for path in sorted(folder.glob("prepared/**/*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            texts[str(path.relative_to(folder))] = {**tensors, "header": str(sorted(file.metadata().items())).encode()}
    return texts


@pytest.mark.parametrize("name", CHANGES)
def test_tasks_in_any_order_and_by_several_processes_make_the_same_files(name, tmp_path):
    expected = prepared_by(opened(tmp_path / "one", name))
    first, second = (opened(tmp_path / "two", name) for _ in range(2))
    first.preparation.equalize()
    for number, stage in enumerate(first.preparation.stages()):
        shuffled = random.Random(number).sample(stage, len(stage))
        for k, task in enumerate(shuffled):
            (first, second)[k % 2].preparation.do(task)
    first.preparation.clear()
    assert contents(tmp_path / "two") == expected
    assert len(expected) == first.space.num_layers * (2 if CHANGES[name]["corrections"] else 1) + 1
    assert first.preparation.stages() == [[], [], [], []]
    assert not list(tmp_path.glob("*/prepared/*/inputs"))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 30])
def test_what_was_killed_goes_on_where_it_was_and_a_task_done_twice_does_no_harm(stop, tmp_path):
    expected = prepared_by(opened(tmp_path / "whole", "activations"))
    killed = opened(tmp_path / "killed", "activations")
    killed.preparation.equalize()
    tasks = [task for stage in killed.preparation.stages() for task in stage]
    for task in tasks[:stop]:
        killed.preparation.do(task)
        killed.preparation.do(task)  # by a worker that was thought dead
    again = opened(tmp_path / "killed", "activations")
    left = [task for stage in again.preparation.stages() for task in stage]
    every = [task for stage in opened(tmp_path / "new", "activations").preparation.stages() for task in stage]
    assert len(left) == len(every) - stop
    assert prepared_by(again) == expected


def test_a_layer_whose_file_is_lost_is_swept_and_made_again_alone(tmp_path):
    run = opened(tmp_path / "run", "weights")
    expected = prepared_by(run)
    run.preparation.files().layer_file(3).unlink()
    sweeps, ranges, on_grids, layers = run.preparation.stages()
    assert [(task.block, task.layers) for task in sweeps] == [(block, (3,)) for block in range(len(run.preparation.blocks))]
    assert [(task.plain, task.layer) for task in layers] == [(False, 3)]
    assert ranges == on_grids == []
    assert prepared_by(run) == expected


def test_a_small_memory_limit_takes_more_sweeps_and_changes_nothing(tmp_path, monkeypatch):
    whole = opened(tmp_path / "whole", "weights")
    expected = prepared_by(whole)
    cut = opened(tmp_path / "cut", "weights")
    limit = max(cut.preparation.moments_bytes(layer) for layer in range(cut.space.num_layers))
    monkeypatch.setattr(type(cut), "memory_limit", 2 * limit)
    tasks = cut.preparation.stages()[0]
    groups = {task.layers for task in tasks}
    assert len(groups) > 2
    assert len(tasks) == len(groups) * len(cut.preparation.blocks)
    for group in groups:
        assert len(group) == 1 or sum(map(cut.preparation.moments_bytes, group)) <= limit
    assert sorted(layer for group in groups for layer in group) == list(range(cut.space.num_layers))
    assert prepared_by(cut) == expected


def test_the_stages_of_activations_are_sweep_ranges_sweep_layers(tmp_path):
    stages = opened(tmp_path / "run", "activations").preparation.stages()
    kinds = [{(type(task), getattr(task, "on_grids", None)) for task in stage} for stage in stages]
    assert kinds == [{(SweepTask, False)}, {(RangesTask, None)}, {(SweepTask, True)}, {(LayerTask, None)}]
    assert {task.plain for task in stages[2]} == {False}  # without corrections nothing matches inputs on grids
    assert all(task.cost > 0 for stage in (stages[0], stages[2], stages[3]) for task in stage)
    costs = [task.cost for task in stages[3]]
    assert costs == sorted(costs, reverse=True)


def test_images_that_several_processes_observe_in_any_order_equalize_alike(tmp_path):
    whole, first, second = (opened(tmp_path / name, "weights", **CLIPPED) for name in ("one", "two", "two"))
    whole.preparation.equalize()
    tasks = first.preparation.observations()
    assert [task.block for task in tasks] == list(range(len(first.preparation.blocks)))
    assert all(task.cost > 0 for task in tasks)
    shuffled = random.Random(0).sample(tasks, len(tasks))
    for k, task in enumerate(shuffled[:-1]):
        (first, second)[k % 2].preparation.do(task)
        second.preparation.do(task)  # by a worker that was thought dead
    assert second.preparation.observations() == shuffled[-1:]
    second.preparation.equalize()
    assert first.preparation.observations() == []
    maxima, alike = (run.preparation.files().network_file.read_bytes() for run in (whole, second))
    assert maxima == alike
    assert second.preparation.network.weights[1].equal(whole.preparation.network.weights[1])
    assert not second.preparation.network.weights[1].equal(second.float_network.weights[1])
    without_clips = opened(tmp_path / "plain", "weights", corrections=["equalization"])
    assert without_clips.preparation.observations() == []  # no image is read for nothing


def test_final_corrections_measure_the_float_network_once_for_all_processes(tmp_path, monkeypatch):
    run, again = (opened(tmp_path / "run", "weights", **CLIPPED) for _ in range(2))
    assert [task for task in run.preparation.stages()[3] if isinstance(task, ReferenceTask)]
    prepared_by(run)
    assert again.preparation.stages() == [[], [], [], []]
    expected = replace(run.preparation.corrected, references={}).final(run.space.narrowest)

    def measured_again(*arguments: object) -> None:
        raise AssertionError("the float network was measured before")

    own = batchnorm_reestimation.correction
    monkeypatch.setattr(batchnorm_reestimation, "correction", replace(own, reference=measured_again))
    final = again.preparation.corrected.final(run.space.narrowest)
    assert final.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final.items())


@pytest.mark.parametrize("name", ["weights", "activations"])
def test_a_run_prepares_what_the_python_interface_prepares(name, tmp_path):
    run = opened(tmp_path / "run", name)
    ours = run.preparation.corrected
    images, _ = run.slices.calibration.load(0, len(run.slices.calibration))
    theirs = prepare(run.float_network, run.space, run.recipe, images.split(9))
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.activation == other.activation
        assert one.weight.equal(other.weight)
        assert (one.bias is None) == (other.bias is None)
        assert one.bias is None or one.bias.equal(other.bias)


def test_a_damaged_file_of_a_sweep_is_refused_by_name(tmp_path):
    run = opened(tmp_path / "run", "weights")
    run.preparation.equalize()
    sweeps, _, _, layers = run.preparation.stages()
    for task in sweeps:
        run.preparation.do(task)
    path = run.preparation.files().inputs.file(layers[0].layer, 1, on_grids=False)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match=rf"{path} is absent or damaged .*; delete it and run again"):
        run.preparation.do(layers[0])


PROGRAM = """
import sys, torch
from pathlib import Path
from clado.network.network import Network
from clado.quantization.sweep import Sweep, groups_within_memory, layer_forms, moments_bytes
from torch import nn

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.manual_seed(0)
torch.set_num_threads(1)
layers = [part for _ in range(8) for part in (nn.Linear(1024, 1024), nn.ReLU())]
network = Network(nn.Sequential(nn.Flatten(), *layers, nn.Linear(1024, 4)), torch.randn(2, 1, 32, 32))
images = torch.randn(64, 1, 32, 32)
sizes = {i: moments_bytes(form) for i, form in layer_forms(network).items()}
Sweep(64, moments=True).gather(network, images, 0, [8])
for limit in (12, 40):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before, most = status("VmRSS"), 0
    for group in groups_within_memory(sizes, limit * 10**6 // 2):
        Sweep(64, moments=True).gather(network, images, 0, group)
    print(limit, (status("VmHWM") - before) / 1e6)
"""


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_a_sweep_grows_the_process_by_less_than_the_limit():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2
    for limit, grown in rows:
        assert float(grown) <= float(limit), done.stdout
