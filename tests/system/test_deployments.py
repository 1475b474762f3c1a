"""The command against real servers and from a wheel, without any network."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from clado.records.run_record import RunRecord
from tests.system.running import PATIENCE, SMALL, Bench, end_group, free_port, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def ask(url: str, question: dict) -> list[dict]:
    """A server's answer; Prefect's says 503 while its SQLite database is locked, and is asked again, as its own client does."""
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    for left in range(9, -1, -1):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code != 503 or not left:
                raise
            time.sleep(2)
    raise AssertionError


@contextmanager
def prefect_server(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Prefect's server on loopback: its API's URL, and what kills it and starts it again on the same database."""
    server = Bench(folder / "server", executable=Path(sys.executable).with_name("prefect"))
    server.environment = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_HOME": str(server.folder)}
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    started = []

    def start() -> None:
        started.append(server.start("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui", name="server"))

    def restart() -> None:
        end_group(started[-1])
        assert not answers(f"{api}/health")
        start()

    start()
    try:
        wait_for(lambda: answers(f"{api}/health"), "the server", started[0])
        yield api, restart
    finally:
        started[-1].send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            started[-1].wait(60)
        end_group(started[-1])


def test_a_flow_run_appears_on_a_prefect_server(tmp_path):
    with prefect_server(tmp_path) as (api, _):
        bench = Bench(tmp_path / "bench", {"PREFECT_API_URL": api})
        bench.write(**SMALL)
        assert "PREFECT_API_URL" in bench.run("doctor", name="doctor")
        bench.run("run", "clado.yaml")
        flows = ask(f"{api}/flows/filter", {})
        assert [flow["name"] for flow in flows] == ["clado-pipeline"]
        runs = ask(f"{api}/flow_runs/filter", {})
        assert [(run["state_type"], run["flow_id"]) for run in runs] == [("COMPLETED", flows[0]["id"])]
        assert bench.outside() == []


def test_a_server_that_is_not_there_is_one_message(tmp_path):
    bench = Bench(
        tmp_path / "bench", {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    )
    bench.write(**SMALL)
    process = bench.start("run", "clado.yaml")
    assert process.wait(PATIENCE) == 2, bench.printed()
    text = bench.printed()
    assert "clado: Prefect did not start" in text
    assert "Traceback" not in text
    assert not (bench.run_folder / "store.zarr").exists()


def test_a_wheel_outside_the_clone_runs_the_demo(tmp_path):
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert uv, "uv is missing; make install puts it beside python"
    built = [uv, "build", "--wheel", "--quiet", "--out-dir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(built, check=True, timeout=PATIENCE)
    wheel = next((tmp_path / "dist").glob("clado-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=PATIENCE)
    python = tmp_path / "venv" / "bin" / "python"
    where = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True, timeout=60).stdout.strip())
    # the libraries of this environment, without its editable install of the clone: files *.pth there are not read
    (packages / "libraries.pth").write_text(site.getsitepackages()[0] + "\n")
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel]
    subprocess.run(install, check=True, timeout=PATIENCE)
    bench = Bench(tmp_path / "elsewhere", executable=tmp_path / "venv" / "bin" / "clado")
    installed = Bench(tmp_path / "asked", executable=python)
    installed.run("-c", "import clado, flows; print(clado.__file__, flows.__file__)")
    assert str(ROOT) not in installed.printed().replace(str(packages), "")
    bench.run("init", name="init")
    bench.run(
        "run", "clado.yaml", "folder=run", "data.sensitivity_images=8", "data.sample_blocks=2", "data.validation_images=50",
        "bits=[2,4]", "estimators=[layerwise,gauss_newton]", "budgets.average_bits=[3]", "cluster.workers=1",
    )  # fmt: skip
    record = RunRecord.load(bench.run_folder / "record.json")
    assert record.methods == ("uniform", "layerwise", "gauss_newton", "chosen")
    assert record.float_accuracy.top1 > 0.8
    assert bench.outside() == []
    assert {path.name for path in bench.folder.iterdir()} >= {"clado.yaml", "run"}
    assert shutil.which("clado", path=str(tmp_path / "venv" / "bin"))
    assert os.access(bench.executable, os.X_OK)
