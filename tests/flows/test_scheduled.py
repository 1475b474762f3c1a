"""Deployments: what prefect.yaml declares is there and loads, and a scheduled run that cannot start says so without failing."""

import inspect
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
import yaml

from clado.errors import ConfigurationError
from clado.settings.loading import load_config, parse_config
from flows import scheduled as module
from flows.guard import locked
from flows.scheduled import scheduled
from tests.running import config

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


def test_the_deployments_are_there():
    assert set(DEPLOYMENTS) == {"nightly", "weekly", "on-demand"}
    assert {name for name, one in DEPLOYMENTS.items() if one.get("schedules")} == {"nightly", "weekly"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_starts_a_flow_with_parameters_that_it_takes(name):
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.flows import load_flow_from_entrypoint

    deployment = DEPLOYMENTS[name]
    assert load_flow_from_entrypoint(deployment["entrypoint"]).fn is scheduled.fn
    parameters = deployment["parameters"]
    inspect.signature(scheduled.fn).bind(**parameters)
    load_config(ROOT / parameters["config"], parameters.get("overrides", []))
    assert deployment["work_pool"]["name"] == "clado"
    assert deployment["concurrency_limit"]["collision_strategy"] in set(ConcurrencyLimitStrategy)
    for schedule in deployment.get("schedules", []):
        CronSchedule(**schedule)  # refuses what is no cron line
        ZoneInfo(schedule["timezone"])
        assert "%" in parameters["folder"], "a schedule that goes on with an old folder measures nothing"


def file_of(tmp_path: Path) -> str:
    path = tmp_path / "clado.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path / "run")))
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [(["budgets.average_bits=[3]"], "resnet20_fashion_mnist at 3 bits"), (["budgets.average_bits=three"], "refused")],
)
def test_a_flow_run_is_called_by_its_network_and_budgets(overrides, name, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "flow_run", SimpleNamespace(parameters={"config": file_of(tmp_path), "overrides": overrides}))
    assert module.flow_run_name() == name


def test_a_folder_that_is_in_use_is_skipped_and_nothing_fails(tmp_path):
    file = file_of(tmp_path)
    with locked(tmp_path / "run"):
        state = scheduled.fn(file)
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert str(tmp_path / "run") in state.message
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_folder_is_named_after_the_scheduled_start_and_overrides_apply(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(module, "flow_run", SimpleNamespace(scheduled_start_time=datetime(2026, 2, 3, 4, tzinfo=UTC)))
    monkeypatch.setattr(
        module, "pipeline", SimpleNamespace(fn=lambda s: commands.append(s) or SimpleNamespace(parent_run_id="7"))
    )
    state = scheduled.fn(file_of(tmp_path), ["data.seed=3"], str(tmp_path / "%Y-%m-%d"))
    (settings,) = commands
    assert (settings.data.seed, settings.folder) == (3, tmp_path / "2026-02-03")
    assert state.type.value == "COMPLETED"
    assert state.name == "Completed"
    assert "MLflow run 7" in state.message


def test_a_folder_that_yaml_would_read_as_a_date_is_a_folder(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        module, "pipeline", SimpleNamespace(fn=lambda s: commands.append(s) or SimpleNamespace(parent_run_id="7"))
    )
    monkeypatch.chdir(tmp_path)
    scheduled.fn(file_of(tmp_path), folder="2026-02-03")
    assert commands[0].folder == Path("2026-02-03")


def test_a_worker_writes_to_the_mlflow_of_the_settings(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        module, "pipeline", SimpleNamespace(fn=lambda s: commands.append(s) or SimpleNamespace(parent_run_id="7"))
    )
    scheduled.fn(file_of(tmp_path), ["tracking.uri=sqlite:///mine.db"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    scheduled.fn(file_of(tmp_path), ["tracking.uri=''"])
    assert [settings.tracking.uri for settings in commands] == [f"sqlite:///{tmp_path}/mine.db", "http://127.0.0.1:9"]


def test_an_override_with_a_password_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        scheduled.fn(file_of(tmp_path), ["tracking.uri=https://me:hunter2@host/"])
    assert "hunter2" not in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


def test_whoever_writes_settings_down_gets_no_credentials():
    """JSON is what Prefect (parameters), MLflow and config.yaml take; the flow itself keeps what it needs."""
    from prefect.client.schemas.actions import FlowRunCreate

    settings = parse_config({**config(Path("run")), "tracking": {"uri": "postgresql://me:hunter2@host/mlflow"}})
    written = {
        "Prefect": FlowRunCreate(
            flow_id="00000000-0000-0000-0000-000000000000", parameters={"config": settings}
        ).model_dump_json(),
        "MLflow": str(settings.model_dump(mode="json")),
        "config.yaml": settings.to_yaml(),
    }
    for where, text in written.items():
        assert "hunter2" not in text, where
        assert "postgresql://***@host/mlflow" in text, where
    assert settings.tracking.uri == "postgresql://me:hunter2@host/mlflow"


def test_a_faulty_setting_is_explained_without_its_credentials():
    with pytest.raises(ConfigurationError) as caught:
        parse_config(
            {**config(Path("run")), "tracking": {"url": "https://me:hunter2@host/"}, "criterion": "https://me:hunter2@host/"}
        )
    assert "criterion" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def prefect_client():
    from prefect.client.orchestration import get_client
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        yield client


@pytest.mark.system
@pytest.mark.parametrize("end", ["Completed", "Failed", "Crashed", "Cancelled"])
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_run_whose_time_comes_while_one_is_active_skips_or_waits_and_an_end_of_any_kind_makes_room(prefect_client, name, end):
    """On a real server, in the place of a worker: it asks for the state in which it would start a run."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

    limit = DEPLOYMENTS[name]["concurrency_limit"]
    flow = prefect_client.create_flow_from_name("clado-scheduled")
    options = {"collision_strategy": ConcurrencyLimitConfig(**limit).collision_strategy}
    deployment = prefect_client.create_deployment(
        flow, f"{name} {end}", concurrency_limit=limit["limit"], concurrency_options=options
    )

    def run() -> str:
        return prefect_client.create_flow_run_from_deployment(deployment).id

    def state_after(run, state) -> str:
        prefect_client.set_flow_run_state(run, state)
        return prefect_client.read_flow_run(run).state.name

    first, second, third = run(), run(), run()
    assert state_after(first, Pending()) == "Pending"
    assert state_after(first, Running()) == "Running"
    waits = limit["collision_strategy"] == "ENQUEUE"
    for other in (second, third):
        assert state_after(other, Pending()) == ("AwaitingConcurrencySlot" if waits else "Cancelled")
    ends = {"Completed": Completed, "Failed": Failed, "Crashed": Crashed, "Cancelled": Cancelled}
    assert state_after(first, ends[end]()) == end
    following = second if waits else run()
    assert state_after(following, Pending()) == "Pending"
    assert state_after(third if waits else run(), Pending()) == ("AwaitingConcurrencySlot" if waits else "Cancelled")
