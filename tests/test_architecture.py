"""Who may import whom: the contracts of pyproject.toml, the doors to outside libraries, what a process loads. Each can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for package in ("clado", "flows") for file in (ROOT / package).rglob("*.py"))
# outside library -> the only places that may import it
DOORS = {
    "zarr": ("clado/shards.py",),
    "safetensors": ("clado/quantized.py", "clado/export/", "clado/sources/", "clado/zoo/train.py"),
    "mlflow": ("clado/tracking.py", "clado/registry.py"),
    "pyscipopt": ("clado/solvers/scip.py",),
    "matplotlib": ("clado/plots.py",),
    "jinja2": ("clado/page.py",),
    "prefect": ("flows/",),
    "dask": ("flows/clusters/",),
    "distributed": ("flows/clusters/", "flows/worker.py"),
    "typer": ("flows/cli.py",),
    "torchvision": ("clado/sources/", "clado/zoo/train.py"),
    "pydantic": ("clado/config.py",),
    "yaml": ("clado/config.py", "clado/template.py"),
}
CORE = (
    "clado.measure",
    "clado.preparation",
    "clado.corrections.gptq",
    "clado.corrections.output_statistics",
    "clado.network",
    "clado.estimators.gauss_newton",
    "clado.estimators.pairwise",
    "clado.evaluation",
)
BEYOND_CORE = ("zarr", "prefect", "dask", "distributed", "mlflow", "pyscipopt", "pydantic", "yaml", "matplotlib", "safetensors",
               "torchvision", "rich", "typer", "psutil")  # fmt: skip
CORE_RUN = """
import numpy as np, torch
from torch import nn
from clado import estimators
from clado.measure import Workbench, measure_tile
from clado.network import Network
from clado.probes import Plan
from clado.preparation import Recipe, prepare
from clado.quantizers import WeightQuantizer
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


def contracts(configuration: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    arguments = [command, "--config", configuration, "--no-cache"]
    return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)


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
    assert trespassers({"clado/measure.py": source, "clado/shards.py": source}) == ["clado/measure.py imports zarr"]


def test_the_import_contracts_hold():
    result = contracts(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_the_import_contracts_can_fail(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    assert '"clado.shards"' in text
    broken = tmp_path / "pyproject.toml"
    broken.write_text(text + '\n[[tool.importlinter.contracts]]\nname = "Wrong"\ntype = "forbidden"\n'
                      'source_modules = ["clado.shards"]\nforbidden_modules = ["zarr"]\n')  # fmt: skip
    result = contracts(broken)
    assert result.returncode != 0
    assert "1 broken" in result.stdout


def test_every_module_of_the_two_columns_is_under_a_contract():
    text = (ROOT / "pyproject.toml").read_text()
    doors = {
        "shards",
        "quantized",
        "tracking",
        "registry",
        "plots",
        "page",
        "api",
        "report",
        "ledger",
        "template",
        "plugins",
        "pareto",
    }  # or above both columns
    modules = {file.stem for file in (ROOT / "clado").glob("[!_]*.py")}
    assert {name for name in modules - doors if f'"clado.{name}"' not in text} == set()


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("import clado", ("torch", "numpy", "pydantic", "yaml", "prefect", "zarr", "mlflow")),
        ("import clado.candidates, clado.solvers, clado.program", ("torch", "prefect", "zarr", "mlflow", "distributed")),
        ("from clado import solvers; import clado.solvers.scip", ("torch", "prefect", "zarr", "mlflow", "distributed")),
        ("import clado.config, flows.cli", ("torch", "numpy", "prefect", "zarr", "mlflow", "matplotlib", "distributed")),
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


def test_the_check_of_blocked_libraries_can_fail():
    result = blocked("import clado.shards", ("zarr",))
    assert result.returncode != 0
    assert "zarr" in result.stderr
