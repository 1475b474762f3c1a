"""A wheel of this project, installed in a clean environment, gives the command and the library."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import clado

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


def run(*command: object, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    """An environment with nothing of this project but its wheel; the libraries that it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("clado-*.whl")
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", wheel, folder=folder)
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def test_the_command_is_there(binaries, tmp_path):
    assert "Usage: clado" in run(binaries / "clado", "--help", folder=tmp_path)
    run(binaries / "clado", "init", folder=tmp_path)
    planned = run(binaries / "clado", "plan", "clado.yaml", folder=tmp_path)
    assert re.search(r"\d", planned)


def test_the_library_is_there(binaries, tmp_path):
    file, module = run(binaries / "python", "-c", LIBRARY, folder=tmp_path).split()
    assert Path(file).is_relative_to(binaries.parent)
    assert Path(file) != Path(clado.__file__)
    assert module == "Sequential"
