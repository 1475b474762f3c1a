"""Settings of a cluster: where tiles are computed."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from clado.settings.fields import Count, Integer, Positive, Settings, UserPath, one_of


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} cannot be used; expected {expected}")
        return text

    return AfterValidator(check)


Address = Annotated[str, _matching(r"(tcp|tls)://[^\s/]+:\d+", "tcp://HOST:PORT or tls://HOST:PORT")]
Name = Annotated[str, _matching(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", "lower-case letters, digits and hyphens")]
Word = Annotated[str, _matching(r"[\w./:@%+=,-]+", "one word of letters, digits and . / : @ % + = , -")]  # it is used in a shell


class TlsSettings(Settings):
    """Certificates of Dask's connections: PEM files at the same path on every machine. `clado certificates` makes some."""

    ca_file: UserPath
    cert: UserPath
    key: UserPath


class SshSettings(Settings):
    """Machines on which workers are started. The first one also runs the scheduler."""

    hosts: tuple[Word, ...]
    user: Word | None = Field(default=None, description="default: from ~/.ssh/config, or your own name")
    port: Count | None = None
    key_file: Path | None = Field(default=None, description="private key; default: those of the agent and of ~/.ssh")
    known_hosts: Path | None = Field(default=None, description="keys of the hosts; default: ~/.ssh/known_hosts")
    python: Word | None = Field(
        default=None, description="Python on the hosts, with clado installed; default: the path of this Python"
    )
    gpus_per_host: Count | None = Field(
        default=None, description="GPUs of each host, one for each worker; default: workers are not pinned"
    )
    interface: Word | None = Field(default=None, description="network interface of the hosts, such as ib0")


class SlurmSettings(Settings):
    """A batch job for each worker."""

    memory: Annotated[str, _matching(r"\d+(\.\d+)?([kKMGT]i?)?B?", "an amount of memory, such as 16GB")] = Field(
        description="memory of one job, such as 16GB"
    )
    partition: Word | None = None
    account: Word | None = None
    walltime: Word = Field(default="04:00:00", description="time limit of one job; a job that ends is submitted again")
    gpus: Integer = Field(default=0, ge=0, description="GPUs of one job")
    interface: Word | None = Field(default=None, description="network interface between the nodes, such as ib0")
    python: Word | None = Field(
        default=None, description="Python on the nodes, with clado installed; default: the path of this Python"
    )
    directives: tuple[str, ...] = Field(default=(), description="more options of sbatch, such as --constraint=a100")
    prologue: tuple[str, ...] = Field(default=(), description="shell lines before the worker starts, such as module load cuda")
    log_folder: UserPath | None = Field(
        default=None, description="folder for the output of jobs; default: where they were submitted"
    )


class ClaimSettings(Settings):
    """A persistent volume claim, mounted in every pod."""

    name: Name
    path: Path


class KubernetesSettings(Settings):
    """Pods that the Dask operator starts. Its custom resources must be installed."""

    image: str = Field(min_length=1, description="container image that has clado")
    name: Name = "clado"
    namespace: Name = "default"
    cpus: Positive = Field(default=1.0, description="CPUs of one worker")
    memory: Word = Field(default="4Gi", description="memory of one worker")
    gpus: Integer = Field(default=0, ge=0, description="GPUs of one worker")
    claims: tuple[ClaimSettings, ...] = Field(
        default=(), description="volumes, such as that of the runs, at the same path as in the flow"
    )
    secret: Name | None = Field(default=None, description="Kubernetes secret that becomes environment variables of the pods")


class ClusterSettings(Settings):
    """Where tiles are computed. Sections of other kinds than `kind` are ignored, so that changing one word moves a run."""

    name: Annotated[str, one_of("clusters")] = Field(default="local", alias="kind")
    workers: Count = Field(default=2, description="number of worker processes; kind address: how many to expect")
    threads_per_worker: Count = Field(default=1, description="torch threads of one worker")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU that a process sees, if there is one"
    )
    share_gpus: bool = Field(strict=True, default=False, description="kind local_gpus: several workers may share a GPU")
    start_timeout: Positive = Field(default=300.0, description="seconds without any worker until the run ends")
    address: Address | None = Field(default=None, description="kind address: the scheduler, tcp://HOST:PORT or tls://HOST:PORT")
    tls: TlsSettings | None = Field(default=None, description="encrypts Dask's connections and accepts only these certificates")
    ssh: SshSettings | None = None
    slurm: SlurmSettings | None = None
    kubernetes: KubernetesSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ClusterSettings":
        examples = {
            "address": "tcp://127.0.0.1:8786",
            "ssh": "{hosts: [node1, node2]}",
            "slurm": "{memory: 16GB}",
            "kubernetes": "{image: registry/clado:0.1.0}",
        }
        if self.name in examples and getattr(self, self.name) is None:
            raise ValueError(f"kind {self.name} needs {self.name}; expected for example {self.name}: {examples[self.name]}")
        if self.name == "address" and str(self.address).startswith("tls") != (self.tls is not None):
            raise ValueError(
                f"address {self.address} {'needs' if self.tls is None else 'takes no'} tls; expected tls://… together with "
                "tls: {ca_file: ca.pem, cert: cert.pem, key: key.pem}, or tcp://… without"
            )
        if self.name == "kubernetes" and self.tls is not None:
            raise ValueError(
                "kind kubernetes takes no tls: the Dask operator talks to its scheduler without encryption; restrict the pods' "
                "network, or start the pods yourself and use kind address"
            )
        if self.name == "ssh" and self.ssh is not None and not 1 <= len(self.ssh.hosts) <= self.workers:
            raise ValueError(
                f"{self.workers} workers cannot be distributed to {len(self.ssh.hosts)} hosts; expected one or more a host"
            )
        return self
