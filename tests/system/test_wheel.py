"""A wheel of this project, in a clean environment without Prefect, Dask and MLflow, gives the command and the library."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import clado
from flows.command_line import OF_FLOWS

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LIBRARY = """
import torch, clado
from torch import nn
from clado.data.zoo import NETWORKS
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
result = clado.compress(model, torch.randn(128, 1, 8, 8), average_bits=4)
print(clado.__file__, type(result.module).__name__)
"""


def run(*command: object, folder: Path, ends: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == ends, done.stdout + done.stderr
    return done.stdout + (done.stderr if ends else "")


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    """An environment with nothing of this project but its wheel; the libraries that it needs are those of this environment.

    It lacks those of the extra `flows`.
    """
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("clado-*.whl")
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", wheel, folder=folder)
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    for library in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = re.split(r"[-.]", library.name)[0].lower()
        if name not in (*OF_FLOWS, "clado", "_editable_impl_clado") and not (packages / library.name).exists():
            (packages / library.name).symlink_to(library)
    return python.parent


def test_the_command_is_there(binaries, tmp_path):
    assert "Usage: clado" in run(binaries / "clado", "--help", folder=tmp_path)
    run(binaries / "clado", "init", folder=tmp_path)
    planned = run(binaries / "clado", "plan", "clado.yaml", folder=tmp_path)
    assert re.search(r"\d", planned)


def test_what_needs_more_says_what_to_install(binaries, tmp_path):
    run(binaries / "clado", "init", folder=tmp_path)
    question = f"from importlib.util import find_spec; print([name for name in {OF_FLOWS} if find_spec(name)])"
    assert run(binaries / "python", "-c", question, folder=tmp_path) == "[]\n"
    told = run(binaries / "clado", "run", "clado.yaml", folder=tmp_path, ends=2)
    assert "pip install 'clado[flows]'" in told


def test_the_library_is_there(binaries, tmp_path):
    file, module = run(binaries / "python", "-c", LIBRARY, folder=tmp_path).split()
    assert Path(file).is_relative_to(binaries.parent)
    assert Path(file) != Path(clado.__file__)
    assert module == "Sequential"
