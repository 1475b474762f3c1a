"""The contract for kinds of clusters with processes, each with real ones; what only they can do wrong; two hosts."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
from distributed import Status

from clado.errors import ConfigurationError, MeasurementError, ServerError
from clado.records.run_record import RunRecord
from clado.run.opened_run import open_run
from flows import clusters
from flows.clusters import _dask, kubernetes, local_gpus
from flows.clusters._certificates import make_certificates
from flows.clusters._dask import ON_LOOPBACK, DaskWorkers
from tests.contracts.cluster import ProcessContract, configuration, echo, note
from tests.running import config, run_pipeline
from tests.system.running import PATIENCE, SMALL, WATCH, Bench, end_group, free_port, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
LOCAL = {"kind": "local", "workers": 2}
DASK = Path(sys.executable).with_name("dask")
ROOT = Path(__file__).parents[2]


def die(document: dict[str, Any], item: int) -> int:
    """A task that no worker survives."""
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def visible() -> str | None:
    """Which GPU this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def gpus_of(workers: DaskWorkers) -> list[str | None]:
    """Which GPU each of two workers may use, as soon as both are there."""
    workers.client.wait_for_workers(2, timeout=PATIENCE)
    return sorted(workers.client.run(visible).values())


class Machines:
    """A scheduler and workers, each started as a command in a folder that is not the flow's."""

    def __init__(self, folder: Path, options: tuple[str, ...] = (), scheme: str = "tcp") -> None:
        self.bench = Bench(folder / "elsewhere", executable=DASK)
        self.options = (*ON_LOOPBACK, *options)
        self.port = free_port()
        self.address = f"{scheme}://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *arguments: object) -> None:
        self.processes[name] = self.bench.start(*arguments, *self.options, name=name)

    def start_scheduler(self) -> None:
        self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", self.port)

    def start_worker(self, name: str, *arguments: object) -> None:
        self.start(name, "worker", self.address, "--host", "127.0.0.1", "--name", name, *(arguments or ("--nthreads", 1)))

    def kill(self, *names: str) -> None:
        for name in names or tuple(self.processes):
            end_group(self.processes.pop(name))

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


@contextmanager
def machines(folder: Path, options: tuple[str, ...] = (), scheme: str = "tcp") -> Iterator[Machines]:
    """A scheduler and two workers."""
    with Machines(folder, options, scheme) as started:
        started.start_scheduler()
        started.start_worker("a")
        started.start_worker("b")
        for name in ("a", "b"):
            wait_for(lambda: "Registered to" in started.bench.printed(name), f"worker {name}", started.processes[name])  # noqa: B023
        yield started
        assert started.bench.outside() == []


class TestLocal(ProcessContract):
    settings: ClassVar = LOCAL


class TestLocalGpus(ProcessContract):
    settings: ClassVar = {"kind": "local_gpus", "workers": 2}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_gpus, "gpus", lambda: ["3", "5"])
            yield cls.settings

    def test_each_worker_sees_one_gpu(self, workers):
        assert gpus_of(workers) == ["3", "5"]


class TestAddress(ProcessContract):
    settings: ClassVar = {"kind": "address", "workers": 2}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        with machines(folder) as started:
            yield {**cls.settings, "address": started.address}


class TestAddressWithTls(ProcessContract):
    settings: ClassVar = {"kind": "address", "workers": 2}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        files = {name: str(path) for name, path in make_certificates(folder / "tls").items()}
        options = ("--tls-ca-file", files["ca_file"], "--tls-cert", files["cert"], "--tls-key", files["key"])
        with machines(folder, options, "tls") as started:
            yield {**cls.settings, "address": started.address, "tls": files}

    def test_nobody_is_let_in_without_a_certificate_of_this_authority(self, workers, tmp_path, monkeypatch):
        monkeypatch.setattr(_dask, "CONNECT_TIMEOUT", 5.0)
        others = {name: str(path) for name, path in make_certificates(tmp_path).items()}
        plain = {**self.settings, "address": self.settings["address"].replace("tls", "tcp"), "tls": None}
        for settings in ({**self.settings, "tls": others}, plain):
            with pytest.raises(ServerError, match=r"no Dask scheduler answers"), clusters.start(configuration(settings)):
                pytest.fail("it was let in")


class TestSsh(ProcessContract):
    settings: ClassVar = {"kind": "ssh", "workers": 2}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        pytest.importorskip("asyncssh", reason="pip install 'clado[ssh]'")
        from tests.system.ssh_server import make_keys

        port = free_port()
        keys = make_keys(folder, port)
        bench = Bench(folder / "bench", executable=Path(sys.executable))
        server = bench.start(ROOT / "tests" / "system" / "ssh_server.py", port, folder, name="server")
        try:
            wait_for(lambda: "ready" in bench.printed("server"), "the SSH server", server)
            yield {
                **cls.settings,
                "ssh": {"hosts": ["127.0.0.1"], "port": port, "user": "clado", "interface": "lo", "gpus_per_host": 2, **keys},
            }
        finally:
            end_group(server)
        wait_for(lambda: not living("distributed.cli.dask_spec"), "the end of what ran on the host")

    def test_each_worker_sees_one_gpu(self, workers):
        assert gpus_of(workers) == ["0", "1"]

    def test_a_host_whose_key_is_not_known_is_refused(self, workers, tmp_path):
        (tmp_path / "known_hosts").touch()
        settings = {**self.settings, "ssh": {**self.settings["ssh"], "known_hosts": str(tmp_path / "known_hosts")}}
        with pytest.raises(ServerError, match=r"do not start over SSH .*[Hh]ost key"), clusters.start(configuration(settings)):
            pytest.fail("it was trusted")


# `sbatch` and `scancel` of a machine without SLURM: a job is a process group
SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then ! grep -e "--constraint=nowhere" >&2; exit; fi
cp "$1" "$0.$$.sh"; echo x >> "$0.count"
setsid bash "$0.$$.sh" > "$0.$$.out" 2>&1 < /dev/null &
echo "Submitted batch job $!"
"""
SCANCEL = "#!/bin/sh\nkill -9 -- -$1\n"


class TestSlurm(ProcessContract):
    settings: ClassVar = {"kind": "slurm", "workers": 2, "slurm": {"memory": "2GB", "interface": "lo"}}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        pytest.importorskip("dask_jobqueue", reason="pip install 'clado[slurm]'")
        for name, script in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        cls.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(folder), prepend=os.pathsep)
            yield cls.settings
        wait_for(lambda: not living(f"{folder}/sbatch."), "the end of the jobs")

    def test_a_job_that_is_refused_is_one_message(self, workers):
        settings = {**self.settings, "slurm": {**self.settings["slurm"], "directives": ["--constraint=nowhere"]}}
        with pytest.raises(ConfigurationError, match=r"refuses .*constraint=nowhere"), clusters.start(configuration(settings)):
            pytest.fail("it was submitted")

    def test_a_job_that_ends_is_submitted_again(self, workers):
        config = configuration(self.settings)
        before = (self.folder / "sbatch.count").read_text().count("x")
        for process in living(f"{self.folder}/sbatch."):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert sorted(item for _, item in workers.map(echo, config, range(5))) == list(range(5))
        assert (self.folder / "sbatch.count").read_text().count("x") > before


class Operator:
    """Stands in for the Dask operator: runs the commands of a DaskCluster's pods as processes of this machine."""

    def __init__(self, custom_cluster_spec: dict[str, Any], namespace: str, **options: Any) -> None:
        assert custom_cluster_spec["metadata"]["namespace"] == namespace
        spec = custom_cluster_spec["spec"]
        self.started = ExitStack()
        self.machines = self.started.enter_context(Machines(self.folder / str(free_port())))
        self.scheduler_address = self.machines.address
        self.status, self.security = Status.running, None
        (scheduler,) = spec["scheduler"]["spec"]["containers"]
        self.run("scheduler", scheduler, "--port", self.machines.port)
        for number in range(spec["worker"]["replicas"]):
            self.run(f"worker-{number}", spec["worker"]["spec"]["containers"][0])

    folder: ClassVar[Path]

    def run(self, name: str, container: dict[str, Any], *more: object) -> None:
        variables = {"DASK_SCHEDULER_ADDRESS": self.scheduler_address, "DASK_WORKER_NAME": name}
        self.machines.bench.environment = {**variables, **{entry["name"]: entry["value"] for entry in container["env"]}}
        here = {"$(DASK_WORKER_NAME)": name, "0.0.0.0": "127.0.0.1"}
        command, *arguments = (here.get(word, word) for word in container["args"])
        assert command == "dask"
        host = () if "--host" in arguments else ("--host", "127.0.0.1")  # a pod finds its own
        self.machines.start(name, *arguments, *host, *more)

    def __enter__(self) -> "Operator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.started.close()


class TestKubernetes(ProcessContract):
    settings: ClassVar = {"kind": "kubernetes", "workers": 2, "kubernetes": {"image": "clado:0.1.0"}}

    @classmethod
    @contextmanager
    def prepared(cls, folder):
        modes = SimpleNamespace(CreateMode=SimpleNamespace(CREATE_ONLY="CREATE_ONLY"))
        library = SimpleNamespace(KubeCluster=Operator, kubecluster=SimpleNamespace(kubecluster=modes))
        Operator.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kubernetes, "optional", lambda *names: library)
            yield cls.settings


def living(words: str) -> list[psutil.Process]:
    """Processes of this user whose command line has these words."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if words in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


# --- what only processes can do wrong


def test_a_task_that_no_worker_survives_is_given_up_with_its_name_and_advice():
    config = configuration(LOCAL)
    with clusters.start(config) as workers, pytest.raises(MeasurementError, match=r"^1 ended its worker .*use fewer workers"):
        list(workers.map(die, config, range(3)))


def test_local_processes_may_be_encrypted(tmp_path):
    files = {name: str(path) for name, path in make_certificates(tmp_path).items()}
    config = configuration({**LOCAL, "tls": files})
    with clusters.start(config) as workers:
        assert sorted(item for _, item in workers.map(echo, config, range(4))) == list(range(4))
        addresses = [workers.client.scheduler.address, *workers.client.nthreads()]
    assert {address.partition("://")[0] for address in addresses} == {"tls"}


def test_a_scheduler_that_is_not_there_is_one_message(monkeypatch):
    monkeypatch.setattr(_dask, "CONNECT_TIMEOUT", 2.0)
    config = configuration({"kind": "address", "address": f"tcp://127.0.0.1:{free_port()}"})
    with pytest.raises(ServerError, match=r"no Dask scheduler answers at tcp://.*dask scheduler"), clusters.start(config):
        pytest.fail("it connected")


def test_a_scheduler_that_is_lost_is_one_message_and_another_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(_dask, "PATROL", 0.5)
    with Machines(tmp_path) as started:
        settings = {"kind": "address", "address": started.address, "start_timeout": 120.0}
        started.start_scheduler()
        wait_for(lambda: "Scheduler at" in started.bench.printed("scheduler"), "the scheduler", started.processes["scheduler"])
        with (
            pytest.raises(ServerError, match=r"no worker after 1 s; .*dask worker"),
            clusters.start(configuration({**settings, "start_timeout": 1.0})),
        ):
            pytest.fail("it started without workers")

        started.start_worker("a", "--nthreads", 2)
        config = configuration(settings)
        with pytest.raises(ServerError, match="computes 2 tasks at once"), clusters.start(config) as workers:
            workers.open_run(open_run(config))
        started.kill("a")

        started.start_worker("b")
        with clusters.start(config) as workers:
            results = workers.map(note, config, [(str(tmp_path / "elsewhere"), k) for k in range(2000)])
            next(results)
            workers.patience = 1.0
            started.kill("b")
            with pytest.raises(ServerError, match=r"no worker has been there for 1 s; what was measured is kept"):
                list(results)

        started.start_worker("c")
        monkeypatch.setattr(_dask, "CONNECT_TIMEOUT", 5.0)  # the client tries that long to find it again
        with clusters.start(config) as workers:
            results = workers.map(note, config, [(str(tmp_path / "elsewhere"), k) for k in range(2000)])
            next(results)
            started.kill("scheduler")
            with pytest.raises(ServerError, match=r"scheduler was lost; what was measured is kept"):
                list(results)
        started.kill()


def test_a_run_leaves_nothing_on_workers_that_outlive_it(tmp_path):
    with machines(tmp_path) as started:
        config = configuration({"kind": "address", "address": started.address}, folder=str(tmp_path / "run"), **SMALL)
        with clusters.start(config) as workers:
            run = open_run(config)
            run.identity.open_store()
            workers.open_run(run)
            assert len(plugins(workers.client.run_on_scheduler)) == 2
        with clusters.start(config) as workers:
            assert plugins(workers.client.run_on_scheduler) == []


def plugins(run_on_scheduler: Any) -> list[str]:
    def found(dask_scheduler: Any) -> list[str]:
        return [name for name in dask_scheduler.worker_plugins if "clado" in name]

    return run_on_scheduler(found)


# --- two hosts


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def hosts():
    """Three network namespaces on one bridge, as hosts of a network: {name: address}."""
    names = [f"clado{os.getpid()}{letter}" for letter in "fab"]
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", names[0], "link", "add", "bridge", "type", "bridge")
            ip("-n", names[0], "link", "set", "bridge", "up")
            ip("-n", names[0], "address", "add", f"{addresses[names[0]]}/24", "dev", "bridge")
            for name in names[1:]:
                ip("-n", name, "link", "add", "wire", "type", "veth", "peer", "name", f"to{name[-1]}", "netns", names[0])
                ip("-n", names[0], "link", "set", f"to{name[-1]}", "master", "bridge", "up")
                ip("-n", name, "address", "add", f"{addresses[name]}/24", "dev", "wire")
                ip("-n", name, "link", "set", "wire", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            pytest.skip(f"this machine makes no network namespaces: {said.decode().strip()}")
        yield addresses
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def on(host: str, bench: Bench, network: str = "10.77.") -> Bench:
    """A bench whose command runs on a host, and may reach the other hosts."""
    inner = bench.executable
    bench.executable = bench.folder / "on_host"
    bench.executable.write_text(f'#!/bin/sh\nexec ip netns exec {host} {inner} "$@"\n')
    bench.executable.chmod(0o755)
    watch = WATCH.replace('startswith("127.")', f'startswith(("127.", "{network}"))')
    (bench.folder / "watch" / "sitecustomize.py").write_text(watch)
    return bench


@pytest.mark.timeout(1500)
def test_the_command_on_two_hosts_gives_what_one_process_gives(hosts, tmp_path):
    flow, first, second = hosts
    files = {name: str(path) for name, path in make_certificates(tmp_path / "tls").items()}
    options = ("--tls-ca-file", files["ca_file"], "--tls-cert", files["cert"], "--tls-key", files["key"], *ON_LOOPBACK)
    address = f"tls://{hosts[first]}:8786"
    started = []
    try:
        for host, name, arguments in (
            (first, "scheduler", ("scheduler", "--host", hosts[first], "--port", 8786)),
            (first, "worker", ("worker", address, "--host", hosts[first], "--nthreads", 1)),
            (second, "worker", ("worker", address, "--host", hosts[second], "--nthreads", 1)),
        ):
            bench = on(host, Bench(tmp_path / f"{host}-{name}", executable=DASK))
            started.append((bench, bench.start(*arguments, *options)))
        run = on(flow, Bench(tmp_path / "flow"))
        measured = {**SMALL, "estimators": ["layerwise", "gauss_newton"]}
        run.write(**measured, cluster={"kind": "address", "workers": 2, "address": address, "tls": files})
        run.run("run", "clado.yaml")
    finally:
        for _, process in started:
            end_group(process)
    run_pipeline(config(tmp_path / "alone", **measured), tracked=False)
    ours, theirs = (RunRecord.load(folder / "record.json") for folder in (run.run_folder, tmp_path / "alone"))
    assert [(r.assignment, r.loss_deployed, r.validation) for r in ours.results] == [
        (r.assignment, r.loss_deployed, r.validation) for r in theirs.results
    ]
    assert all("10.77.0" in bench.printed() for bench, _ in started)
    assert [line for bench in (run, *(bench for bench, _ in started)) for line in bench.outside()] == []
