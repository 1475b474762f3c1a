"""Clusters without processes: the contract for `inline`, what is refused before anything starts, scripts and manifests."""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clado.errors import ConfigurationError, ServerError
from clado.plugins import PACKAGE
from clado.settings.loading import parse_config
from flows import clusters
from flows.clusters import local_gpus
from flows.clusters._certificates import make_certificates
from flows.clusters._inspection import Inspection, located, versions
from flows.clusters._tls import security
from tests.contracts.cluster import ClusterContract, configuration

SSH = {"kind": "ssh", "workers": 3, "ssh": {"hosts": ["node1", "node2"], "gpus_per_host": 2}}
SLURM = {
    "kind": "slurm", "workers": 4, "threads_per_worker": 2,
    "slurm": {"memory": "16GB", "partition": "gpu", "account": "vision", "gpus": 1, "walltime": "02:00:00",
              "python": "/opt/clado/bin/python", "directives": ["--constraint=a100"], "prologue": ["module load cuda"],
              "log_folder": "/scratch/logs"},
}  # fmt: skip
KUBERNETES = {
    "kind": "kubernetes", "workers": 4,
    "kubernetes": {"image": "registry/clado:0.1.0", "namespace": "vision", "gpus": 1, "memory": "8Gi", "secret": "store",
                   "claims": [{"name": "runs", "path": "/runs"}]},
}  # fmt: skip


class TestInline(ClusterContract):
    settings = {"kind": "inline"}  # noqa: RUF012 (a constant of the contract)


def test_every_kind_of_cluster_keeps_the_contract():
    kinds = {file.stem for file in (PACKAGE.parent / "flows" / "clusters").glob("[!_]*.py")}
    tests = "".join(file.read_text() for file in (PACKAGE.parent / "tests").glob("*/test_*cluster*.py"))
    assert {kind for kind in kinds if f'"kind": "{kind}"' in tests} == kinds


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "address"}, ["kind address needs address", "tcp://127.0.0.1:8786"]),
        ({"kind": "address", "address": "127.0.0.1:8786"}, ["cluster.address", "tcp://HOST:PORT"]),
        ({"kind": "address", "address": "tls://a:1"}, ["needs tls", "ca_file"]),
        (
            {"kind": "address", "address": "tcp://a:1", "tls": {"ca_file": "a", "cert": "b", "key": "c"}},
            ["takes no tls", "tls://"],
        ),
        ({"tls": {"ca_file": "a"}}, ["'cluster.tls.cert' is missing", "'cluster.tls.key' is missing"]),
        ({"kind": "ssh"}, ["kind ssh needs ssh", "hosts"]),
        ({"kind": "ssh", "ssh": {"hots": ["a"]}}, ["cluster.ssh.hots", "did you mean 'hosts'"]),
        ({"kind": "ssh", "ssh": {"hosts": ["a; rm -rf ~"]}}, ["cluster.ssh.hosts.0", "one word"]),
        ({"kind": "ssh", "workers": 1, "ssh": {"hosts": ["a", "b"]}}, ["1 workers", "2 hosts"]),
        ({"kind": "slurm"}, ["kind slurm needs slurm", "memory"]),
        ({"kind": "slurm", "slurm": {}}, ["'cluster.slurm.memory' is missing"]),
        ({"kind": "slurm", "slurm": {"memory": "lots"}}, ["cluster.slurm.memory", "'lots'", "such as 16GB"]),
        ({"kind": "kubernetes"}, ["kind kubernetes needs kubernetes", "image"]),
        ({"kind": "kubernetes", "kubernetes": {"image": "a", "name": "A_b"}}, ["cluster.kubernetes.name", "lower-case"]),
        ({**KUBERNETES, "tls": {"ca_file": "a", "cert": "b", "key": "c"}}, ["kubernetes takes no tls", "kind address"]),
    ],
    ids=str,
)
def test_a_cluster_that_is_not_complete_is_refused(settings: dict[str, Any], expected: list[str]):
    with pytest.raises(ConfigurationError) as refusal:
        configuration(settings)
    for words in expected:
        assert words in str(refusal.value)


def test_one_word_moves_a_run_to_another_cluster():
    sections = {**SSH, **SLURM, **KUBERNETES, "address": "tcp://127.0.0.1:8786"}
    kinds = ("inline", "local", "local_gpus", "address", "ssh", "slurm", "kubernetes")
    configs = [configuration({**sections, "kind": kind}) for kind in kinds]
    assert len({config.run_folder for config in configs}) == 1
    assert [config.cluster.name for config in configs] == list(kinds)
    assert len({hash(config) for config in configs}) == len(kinds)


# --- GPUs


@pytest.mark.parametrize(
    ("gpus", "settings", "pins"),
    [
        (["0", "1"], {"workers": 2}, ["0", "1"]),
        (["0", "1", "2"], {"workers": 2}, ["0", "1"]),
        (["0"], {"workers": 2, "share_gpus": True}, ["0", "0"]),
        (["GPU-a", "GPU-b"], {"workers": 3, "share_gpus": True}, ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_each_worker_has_its_gpu(monkeypatch, gpus, settings, pins):
    monkeypatch.setattr(local_gpus, "gpus", lambda: gpus)
    config = configuration({"kind": "local_gpus", **settings})
    assert local_gpus.pins(config.cluster) == pins
    assert clusters.describe(config).count("CUDA_VISIBLE_DEVICES=") == len(pins)


@pytest.mark.parametrize(("gpus", "expected"), [([], "no GPU that torch can use.*kind: local"), (["0"], r"share_gpus=true")])
def test_too_few_gpus_are_refused_before_anything_starts(monkeypatch, gpus, expected):
    monkeypatch.setattr(local_gpus, "gpus", lambda: gpus)
    with pytest.raises(ConfigurationError, match=expected), clusters.start(configuration({"kind": "local_gpus"})):
        pytest.fail("it started")


@pytest.mark.parametrize(
    ("named", "visible"), [(None, ["0", "1"]), ("4,7", ["4", "7"]), ("MIG-x,MIG-y,MIG-z", ["MIG-x", "MIG-y"])]
)
def test_gpus_are_those_that_this_process_may_use(monkeypatch, named, visible):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert local_gpus.gpus() == visible


# --- other machines


def test_a_worker_gets_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config({
        "network": {"source": "factory", "name": "net:make", "weights": "w.safetensors"},
        "data": {"source": "folder", "path": "images"}, "constraints": [{"kind": "latency", "bound": 1.0, "path": "/t.csv"}],
    })  # fmt: skip
    absolute = located(config)
    assert (absolute.network.weights, absolute.data.path) == (tmp_path / "w.safetensors", tmp_path / "images")
    assert absolute.run_folder == tmp_path / config.run_folder  # still named after the settings as they were given
    assert absolute.constraints[0].path == Path("/t.csv")
    assert located(absolute) == absolute
    assert absolute.network.weights != "random"
    assert located(parse_config({"network": {"source": "timm", "name": "x", "weights": "random"},
                                 "data": {"source": "folder", "path": "i"}})).network.weights == "random"  # fmt: skip


def worker(nthreads: int = 1) -> SimpleNamespace:
    return SimpleNamespace(address="tcp://node7:4000", state=SimpleNamespace(nthreads=nthreads))


def test_a_worker_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    config = configuration({"kind": "local"}, folder=str(tmp_path / "run"))
    (tmp_path / "run" / "store.zarr").mkdir(parents=True)
    inspection = Inspection(config)
    inspection.setup(worker())
    with pytest.raises(ServerError, match=r"node7:4000 computes 4 tasks at once.*--nthreads 1"):
        inspection.setup(worker(4))
    inspection.versions = {**versions(), "torch": "1.0"}
    with pytest.raises(ServerError, match=r"has torch .* where the flow has 1\.0; expected the same"):
        inspection.setup(worker())
    inspection.versions = versions()
    (tmp_path / "run" / "store.zarr").rmdir()
    with pytest.raises(ServerError, match=r"does not see .*store\.zarr; expected folder: .* every machine shares"):
        inspection.setup(worker())


def test_a_missing_library_names_its_extra(monkeypatch):
    import sys

    for module, settings in {"asyncssh": SSH, "dask_jobqueue": SLURM, "dask_kubernetes.operator": KUBERNETES}.items():
        monkeypatch.setitem(sys.modules, module, None)
        with (
            pytest.raises(ConfigurationError, match=rf"pip install 'clado\[{settings['kind']}\]'"),
            clusters.start(configuration(settings)),
        ):
            pytest.fail("it started")


def test_a_machine_without_slurm_is_told_so(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="pip install 'clado[slurm]'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="sbatch, which is not here"), clusters.start(configuration(SLURM)):
        pytest.fail("it started")


def test_ssh_says_which_worker_runs_where():
    assert clusters.describe(configuration(SSH)).splitlines() == [
        "scheduler: node1",
        "worker 0: node1, CUDA_VISIBLE_DEVICES=0",
        "worker 1: node2, CUDA_VISIBLE_DEVICES=0",
        "worker 2: node1, CUDA_VISIBLE_DEVICES=1",
    ]


def test_address_says_what_must_run():
    said = clusters.describe(configuration({"kind": "address", "address": "tcp://10.0.0.1:9000"}))
    assert "dask scheduler --port 9000" in said
    assert "2 x dask worker tcp://10.0.0.1:9000 --nthreads 1" in said


def test_the_slurm_script():
    pytest.importorskip("dask_jobqueue", reason="pip install 'clado[slurm]'")
    said = clusters.describe(configuration(SLURM))
    lines = said.splitlines()
    assert lines[0].startswith("#!/")
    assert {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")} == {
        "-J clado", "-p gpu", "-A vision", "-n 1", "--cpus-per-task=2", "--mem=15G", "-t 02:00:00", "--gres=gpu:1",
        "--output=/scratch/logs/clado-%j.txt", "--constraint=a100",
    }  # fmt: skip
    exports = {f"export {name}=2" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    assert exports | {"module load cuda"} < set(lines)
    (command,) = [line for line in lines if "dask_worker" in line]
    assert command.startswith("/opt/clado/bin/python -m distributed.cli.dask_worker tcp://SCHEDULER:PORT ")
    assert "--nthreads 1 " in command
    assert not Path("/scratch/logs").exists()


def test_the_slurm_script_with_tls(tmp_path):
    pytest.importorskip("dask_jobqueue", reason="pip install 'clado[slurm]'")
    files = {name: str(path) for name, path in make_certificates(tmp_path).items()}
    said = clusters.describe(configuration({**SLURM, "tls": files}))
    assert f"--protocol tls:// --tls-ca-file {files['ca_file']} --tls-cert {files['cert']} --tls-key {files['key']}" in said


def test_the_kubernetes_manifest():
    document = json.loads(clusters.describe(configuration(KUBERNETES)))
    assert (document["apiVersion"], document["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    assert document["metadata"] == {"name": "clado", "namespace": "vision"}
    workers = document["spec"]["worker"]
    assert workers["replicas"] == 4
    (container,) = workers["spec"]["containers"]
    assert container["args"][:4] == ["dask", "worker", "--nthreads", "1"]
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert {entry["name"]: entry["value"] for entry in container["env"]}["OMP_NUM_THREADS"] == "1"
    assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert workers["spec"]["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert document["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == "clado"


def test_the_operator_takes_the_manifest():
    library = pytest.importorskip("dask_kubernetes", reason="pip install 'clado[kubernetes]'")
    import yaml
    from jsonschema import Draft202012Validator

    chart = Path(library.__file__).parent / "operator" / "deployment" / "helm" / "dask-kubernetes-operator"
    definition = yaml.safe_load((chart / "crds" / "daskcluster.yaml").read_text())
    schema = Draft202012Validator(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    document = json.loads(clusters.describe(configuration(KUBERNETES)))
    schema.validate(document)
    document["spec"]["worker"]["replicas"] = "many"
    assert not schema.is_valid(document)


# --- TLS


def test_certificates_are_for_nobody_else_and_overwrite_nothing(tmp_path):
    files = make_certificates(tmp_path / "tls", hosts=["node1", "10.0.0.7"])
    assert {name: path.name for name, path in files.items()} == {"ca_file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in files.values())
    before = files["key"].read_bytes()
    with pytest.raises(ConfigurationError, match="exists already"):
        make_certificates(tmp_path / "tls")
    assert files["key"].read_bytes() == before

    from cryptography import x509

    ca, cert = (x509.load_pem_x509_certificate(files[name].read_bytes()) for name in ("ca_file", "cert"))
    cert.verify_directly_issued_by(ca)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "node1"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "10.0.0.7"} <= {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_tls_settings_reach_dask(tmp_path):
    files = make_certificates(tmp_path)
    config = configuration({"tls": {name: str(path) for name, path in files.items()}})
    secured = security(config.cluster)
    assert secured.require_encryption
    assert secured.get_tls_config_for_role("worker")["key"] == str(files["key"])
    assert security(configuration({"kind": "local"}).cluster) is None


@pytest.mark.parametrize("broken", ["ca_file", "cert", "key"])
def test_certificates_that_cannot_be_used_are_refused(tmp_path, broken):
    paths = {name: str(path) for name, path in make_certificates(tmp_path).items()}
    Path(paths[broken]).write_text("not a certificate")
    for files in (paths, {**paths, broken: str(tmp_path / "nowhere.pem")}):
        with pytest.raises(ConfigurationError, match=r"cluster\.tls cannot be used .*PEM"):
            security(configuration({"tls": files}).cluster)
