"""What a run reads runs no code of the data's, and what a configuration names stays where it belongs. Each check can fail."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from clado.errors import ServerError, StoreError
from clado.settings.loading import parse_config
from flows.commands.export import budget_folder
from flows.services import HOST, LIST, NAMES, Ports, declare, down, up
from tests.running import config
from tests.test_architecture import SOURCES, imports_of

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """Calls that would run code out of what they read."""
    problems = sorted(imports_of(source) & PICKLES)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, arguments = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("np.load", "numpy.load") and arguments.get("allow_pickle", "False") != "False":
            problems.append("np.load with pickles")
        if name == "torch.load" and arguments.get("weights_only") != "True":
            problems.append("torch.load of more than weights")
        if name in ("eval", "exec") or (name == "yaml.load" and ast.unparse(node.args[1]) != "_Loader"):
            problems.append(name)
    return problems


def test_nothing_that_is_read_is_unpickled():
    assert {str(file): problems for file in SOURCES if (problems := unsafe(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "np.load(f, allow_pickle=True)", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
     "yaml.load(f, yaml.Loader)"],
)  # fmt: skip
def test_the_check_of_pickles_can_fail(source):
    assert unsafe(source)


def test_our_yaml_makes_no_objects(tmp_path):
    from clado.errors import ConfigurationError
    from clado.settings.loading import load_config

    (tmp_path / "clado.yaml").write_text(f"network: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ConfigurationError):
        load_config(tmp_path / "clado.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "/etc/passwd", "a/../../b", "3 bits", "..\\..\\x"])
def test_names_make_one_folder_within_the_runs(tmp_path, name):
    folders = budget_folder(SimpleNamespace(folder=tmp_path), f"{name} ")
    assert folders.resolve().parent == (tmp_path / "exports").resolve()


@pytest.mark.parametrize("name", ["../../../etc:make", "..:make", "/etc/x:make", "a/b:c/../../d"])
def test_the_networks_name_makes_one_folder_below_runs(name):
    network, data = {"source": "factory", "name": name}, {"source": "folder", "path": "images"}
    settings = parse_config({**config(Path("unused")), "folder": None, "network": network, "data": data})
    assert settings.run_folder.resolve().parent == Path("runs").resolve()


def test_services_that_were_started_in_part_are_not_up(tmp_path):
    mine = psutil.Process()
    known = {"processes": {"prefect": {"pid": mine.pid, "began": mine.create_time()}}, "environment": {}}
    (tmp_path / LIST).write_text(json.dumps(known))
    with pytest.raises(
        ServerError, match=r"mlflow, scheduler, workers, runner have ended or never started .* clado down, then up"
    ):
        up(tmp_path, Ports(), 1, None, 1.0)
    for damaged in ("{", "[]", '{"processes": {"prefect": 7}}'):
        (tmp_path / LIST).write_text(damaged)
        for call in (lambda: up(tmp_path, Ports(), 1, None, 1.0), lambda: down(tmp_path)):
            with pytest.raises(StoreError, match="is damaged"):
                call()


def test_every_service_is_named_in_the_order_in_which_they_start(tmp_path):
    assert set(declare(tmp_path, Ports(), 1, None)) == set(NAMES)


@pytest.mark.parametrize("database", [None, "postgresql://me:hunter2@db:5432"])
def test_services_listen_on_loopback_and_show_no_password(tmp_path, database):
    for name, service in declare(tmp_path, Ports(), 2, database).items():
        assert "0.0.0.0" not in service.command
        assert "hunter2" not in " ".join(service.command), name
        if name != "runner":  # which listens nowhere
            assert service.command[service.command.index("--host") + 1] == HOST
