"""Who may import whom: the contracts of pyproject.toml, the doors to outside libraries, what a process loads. Each can fail."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.command_line import OF_FLOWS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for package in ("clado", "flows") for file in (ROOT / package).rglob("*.py"))
# outside library -> the only places that may import it
DOORS = {
    "zarr": ("clado/storage/measurement_store.py",),
    "safetensors": ("clado/storage/tensor_files.py", "clado/exporting/", "clado/data/sources/", "clado/data/zoo/train.py"),
    "mlflow": ("clado/tracking/",),
    "pyscipopt": ("clado/choosing/solvers/scip.py",),
    "matplotlib": ("clado/reporting/plots.py",),
    "jinja2": ("clado/reporting/page.py",),
    "prefect": ("flows/",),
    "dask": ("flows/clusters/",),
    "distributed": ("flows/clusters/", "flows/worker.py"),
    "typer": ("flows/cli.py", "flows/command_line.py", "flows/commands/machines.py"),
    "torchvision": ("clado/data/decoding.py", "clado/data/sources/", "clado/data/zoo/train.py"),
    "pydantic": ("clado/settings/",),
    "yaml": ("clado/settings/",),
}
CORE = (
    "clado.measuring.measurements",
    "clado.quantization.preparation",
    "clado.quantization.corrections.gptq",
    "clado.quantization.corrections.output_statistics",
    "clado.network.network",
    "clado.interaction.estimators.gauss_newton",
    "clado.interaction.estimators.pairwise",
    "clado.evaluation",
)
BEYOND_CORE = ("zarr", "prefect", "dask", "distributed", "mlflow", "pyscipopt", "pydantic", "yaml", "matplotlib", "safetensors",
               "torchvision", "rich", "typer", "psutil")  # fmt: skip
CORE_RUN = """
import numpy as np, torch
from torch import nn
from clado.interaction import estimators
from clado.measuring.measurements import measure_tile
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.measuring.plan import Plan
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
network = Network(model, torch.randn(2, 1, 8, 8))
space, x = network.search_space((2, 4)), torch.randn(4, 1, 8, 8)
recipe = Recipe(WeightQuantizer(), corrections=("gptq", "output_statistics", "batchnorm_reestimation"))
prepared = prepare(network, space, recipe, [torch.randn(32, 1, 8, 8)])
bench = Workbench(prepared, "kl_to_float", ((0, 4),), lambda a, b: (x[a:b], None))
plan = Plan(space, ((0, 4),), ("singles", "gram"), 4)
sums = {tile.kind: measure_tile(bench, tile)[None] for tile in plan.tiles}
assert estimators.estimate("gauss_newton", estimators.Measured(space, "kl_to_float", np.array([4]), sums)).values.shape == (4, 4)
"""

LIBRARY_RUN = """
import pkgutil
from importlib import import_module
import torch, clado
from torch import nn
for module in pkgutil.walk_packages(clado.__path__, "clado."):
    if module.name != "clado.data.zoo.train":  # a script
        import_module(module.name)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
result = clado.compress(model, torch.randn(128, 1, 8, 8), average_bits=4)
result.save("network.safetensors")
for module in (result.module, clado.load_packed("network.safetensors", model)):
    assert module(torch.randn(2, 1, 8, 8)).shape == (2, 3)
clado.plot(result.matrices["gauss_newton"]).savefig("matrix.png")
"""


def imports_of(source: str) -> set[str]:
    """Top-level names of the modules that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            first = node.args[0]
            names |= {first.value.split(".")[0]} if isinstance(first, ast.Constant) else set()
    return names


def trespassers(files: dict[str, str]) -> list[str]:
    """Files that import a library outside its door."""
    return [
        f"{name} imports {library}"
        for name, source in files.items()
        for library in imports_of(source) & DOORS.keys()
        if not name.startswith(DOORS[library])
    ]


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)


def loaded(script: str, names: tuple[str, ...]) -> set[str]:
    """Which of the modules a fresh process has after a script."""
    result = python(f"{script}\nimport sys; print(*(set({names!r}) & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def blocked(script: str, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """A script in a process where some libraries are not installed."""
    return python(f"import sys\nfor name in {names!r}: sys.modules[name] = None\n{script}")


def contracts(folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of the packages in a folder."""
    command = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [command, "--no-cache"], check=False, capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )


def test_outside_libraries_come_in_by_their_door():
    files = {str(file.relative_to(ROOT)): file.read_text() for file in SOURCES}
    assert len(files) > 40
    assert trespassers(files) == []
    assert {library for source in files.values() for library in imports_of(source)} >= DOORS.keys()  # no door is idle


@pytest.mark.parametrize(
    "source",
    ["import zarr", "import zarr.codecs as z", "from zarr import open", "def f():\n    import zarr", "import_module('zarr.api')"],
)
def test_the_check_of_doors_can_fail(source):
    assert trespassers({"clado/measuring/sweep.py": source, "clado/storage/measurement_store.py": source}) == [
        "clado/measuring/sweep.py imports zarr"
    ]


def test_the_import_contracts_hold():
    result = contracts()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        (
            "clado/network/wrong.py",
            "import clado.storage.prepared_layers",
            "network is not allowed to import clado.storage",
        ),
        ("clado/records/text.py", "from clado.choosing import program", "clado.records is not allowed to import clado.choosing"),
        ("clado/attic.py", "", "attic"),
        ("clado/choosing/wrong.py", "import torch", "clado.choosing is not allowed to import torch"),
        ("clado/measuring/wrong.py", "import zarr", "clado.measuring is not allowed to import zarr"),
        ("clado/run/wrong.py", "import prefect", "clado is not allowed to import prefect"),
        ("clado/paper.py", "import clado.space", "clado.paper is not allowed to import clado.space"),
        ("clado/run/wrong.py", "import clado.paper", "clado.run.wrong -> clado.paper"),
    ],
    ids=[
        "storage",
        "upwards",
        "a module in no room",
        "torch in choosing",
        "zarr in measuring",
        "an orchestrator",
        "the oracle",
        "on the oracle",
    ],
)
def test_a_module_in_the_wrong_room_breaks_a_contract(module, source, told, tmp_path):
    for package in ("clado", "flows"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{source}\n")
    result = contracts(tmp_path)
    assert result.returncode != 0
    assert told in result.stdout


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("import clado", ("torch", "numpy", "pydantic", "yaml", "prefect", "zarr", "mlflow")),
        (
            "import clado.choosing.proposals, clado.choosing.solvers, clado.choosing.program",
            ("torch", "prefect", "zarr", "mlflow", "distributed"),
        ),
        ("import clado.choosing.solvers.scip", ("torch", "prefect", "zarr", "mlflow", "distributed")),
        ("import clado.settings.schema, flows.cli", ("torch", "numpy", "prefect", "zarr", "mlflow", "matplotlib", "distributed")),
        ("import clado; clado.Network, clado.measure, clado.solve", ("prefect", "distributed", "zarr", "mlflow", "matplotlib")),
        (CORE_RUN, BEYOND_CORE[:10]),
    ],
    ids=["the package", "allocation", "allocation with SCIP", "the command", "the Python path", "measuring"],
)
def test_a_process_loads_only_what_it_needs(script, absent):
    assert loaded(script, absent) == set()


def test_the_check_of_a_process_can_fail():
    assert loaded("import clado; clado.Network", ("torch", "prefect")) == {"torch"}


def test_measuring_runs_with_torch_and_numpy_alone():
    result = blocked("".join(f"import {name}\n" for name in CORE) + CORE_RUN, BEYOND_CORE)
    assert result.returncode == 0, result.stderr


def test_the_library_works_without_the_extra_flows(tmp_path):
    script = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r}){LIBRARY_RUN}"
    result = blocked(script, OF_FLOWS)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "matrix.png").stat().st_size > 1000


def test_a_command_that_needs_the_extra_flows_says_so(tmp_path):
    arguments = ["clado", "run", str(ROOT / "demo.yaml"), f"folder={tmp_path / 'run'}"]
    script = f"sys.argv = {arguments!r}; from flows.cli import main; main()"
    result = blocked(script, OF_FLOWS)
    assert result.returncode == 2
    assert "not installed; expected: pip install 'clado[flows]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_check_of_blocked_libraries_can_fail():
    result = blocked("import clado.storage.measurement_store", ("zarr",))
    assert result.returncode != 0
    assert "zarr" in result.stderr
