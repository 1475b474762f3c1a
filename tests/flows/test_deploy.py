"""A deployment is a folder that runs without clado, says what was measured, and fails loudly where it computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clado.data.sources.folder import ImageFile
from clado.errors import StoreError
from clado.exporting.runtimes.onnxruntime import runtime
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from flows.cli import app
from flows.commands.deploy import deploy, preprocessing_of, self_check
from tests.running import config, copy_of


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> OpenedRun:
    folder = tmp_path_factory.mktemp("deploy") / "run"
    return open_run(parse_config(config(folder, bits=[4, 8], activations={"bits": [8]}, corrections=[])))


@pytest.fixture(scope="module")
def deployed(run, tmp_path_factory) -> tuple[Path, str]:
    """Every second layer at four bits."""
    space = run.space
    assignment = space.assignment([first + i % 2 for i, first in enumerate(space.offsets[:-1])])
    folder = tmp_path_factory.mktemp("deployed") / "out"
    return folder, deploy(run, "onnxruntime", runtime, assignment, folder, 1, 60)


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_folder_says_what_the_runtime_computes(run, deployed):
    folder, told = deployed
    x, labels = run.slices.validation.load(0, 60)
    logits = runtime.open(folder / "network.onnx", 1)(x.numpy())
    facts = json.loads((folder / "deployment.json").read_text())
    first, *others = facts["measured"]["networks"]
    assert (first["name"], [other["name"] for other in others]) == ("deployed", ["float", "uniform 8 bits"])
    assert first["top1"] == float((logits.argmax(1) == labels.numpy()).mean())
    assert first["file_bytes"] == (folder / "network.onnx").stat().st_size < others[1]["file_bytes"] < others[0]["file_bytes"]
    assert all(network["milliseconds"] > 0 for network in facts["measured"]["networks"])
    assert facts["measured"]["num_images"] == 60
    readme = (folder / "README.md").read_text()
    for text in (
        f"{first['file_bytes']:,}",
        f"{100 * first['top1']:.2f}",
        f"{first['milliseconds']:.3f}",
        "60 validation images",
    ):
        assert text in readme
        assert text in told
    assert "OK: 16 images" in told
    assert run.space.from_json(json.loads((folder / "assignment.json").read_text())).bits[:2] == (4, 8)


def test_the_loader_classifies_a_file_as_clado_does_without_importing_it(run, deployed, tmp_path):
    folder = deployed[0]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    code = (
        "import sys; sys.argv = ['predict.py', sys.argv[1]]; import predict, numpy as np; "
        "np.save(sys.argv[1] + '.npy', predict.read(sys.argv[1])); "
        "assert not {'clado', 'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "image.png")], check=True, cwd=folder)
    expected = preprocessing_of(run)(ImageFile(tmp_path, tmp_path / "image.png")).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "image.png.npy"), expected, rtol=0, atol=1e-5)
    for name in ("loader.py", "predict.py"):
        assert sum(bool(line.strip()) for line in (folder / name).read_text().splitlines()) <= 20, name
    said = subprocess.run(
        [sys.executable, "predict.py", str(tmp_path / "image.png")], check=True, cwd=folder, capture_output=True, text=True
    ).stdout
    logits = runtime.open(folder / "network.onnx", 1)(expected[None])
    assert said.split()[-1] == str(logits.argmax())


def test_another_file_fails_the_self_check(deployed, tmp_path):
    folder = copy(deployed[0], tmp_path / "copy")
    assert self_check(folder).startswith("OK")
    with (folder / "network.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StoreError, match=r"FAILED: network.onnx is another file"):
        self_check(folder)


def test_other_outputs_fail_the_self_check(deployed, tmp_path):
    folder = copy(deployed[0], tmp_path / "copy")
    with np.load(folder / "check.npz") as archive:
        images, logits = archive["images"], archive["logits"]
    np.savez(folder / "check.npz", images=images, logits=logits + 0.02 * (logits.max() - logits.min()))
    with pytest.raises(StoreError, match=r"FAILED: outputs differ .* do not use the network here"):
        self_check(folder)


def test_a_folder_of_something_else_is_left_alone(run, deployed, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    for folder in (tmp_path, deployed[0]):
        before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        with pytest.raises(StoreError, match="holds something other than this deployment"):
            deploy(run, "onnxruntime", runtime, run.space.widest, folder, 1, 10)
        assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_the_command_deploys_what_was_chosen(finished, tmp_path):
    folder = Path(copy_of(finished, tmp_path / "runs" / "copied")["folder"])
    result = CliRunner().invoke(app, ["deploy", str(folder), "--budget", "3", "--images", "20"])
    assert result.exit_code == 0, result.output
    assert "OK: 16 images" in result.output
    assert len(list((folder / "deployments").glob("*/network.onnx"))) == 1
