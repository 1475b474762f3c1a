"""Worker pods and a scheduler pod, which the Dask operator starts from a DaskCluster resource."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clado.errors import ServerError
from clado.settings.cluster import ClusterSettings, KubernetesSettings
from flows.clusters import optional
from flows.clusters._dask import ON_LOOPBACK, DaskWorkers, connected, quiet, scheduler_environment, threads

IDLE_TIMEOUT = 7200  # seconds without a task until the operator ends a cluster: its flow may be lost
PORTS = {"tcp-comm": 8786, "http-dashboard": 8787}  # the operator finds them by this name


@contextmanager
def start(settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """Creates the resource, and deletes it when the context ends. The operator starts a lost pod again."""
    library = optional("dask_kubernetes.operator", "dask-kubernetes", "kubernetes")
    quiet()
    section = _section(settings)
    try:
        cluster = library.KubeCluster(
            custom_cluster_spec=manifest(settings),
            namespace=section.namespace,
            resource_timeout=int(settings.start_timeout),
            create_mode=library.kubecluster.kubecluster.CreateMode.CREATE_ONLY,
            quiet=True,
        )
    except Exception as error:
        raise ServerError(
            f"Kubernetes starts no Dask cluster ({type(error).__name__}: {error}); expected a cluster that kubectl reaches, with "
            f"the Dask operator in it, and no DaskCluster {section.name} in the namespace {section.namespace}"
        ) from None
    with cluster, connected(cluster, settings) as workers:
        yield workers


def describe(settings: ClusterSettings) -> str:
    """The manifest as JSON, which `kubectl apply -f` takes."""
    return json.dumps(manifest(settings), indent=2)


def manifest(settings: ClusterSettings) -> dict[str, Any]:
    """The DaskCluster resource: `workers` pods of one task at a time, a scheduler and its service."""
    section = _section(settings)
    command = ["dask", "scheduler", "--host", "0.0.0.0"]
    scheduler = _container(section, "scheduler", command, scheduler_environment())
    scheduler["ports"] = [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in PORTS.items()]
    scheduler["readinessProbe"] = {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 2}
    scheduler["resources"] = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}
    worker = ["dask", "worker", "--nthreads", "1", *ON_LOOPBACK, "--name", "$(DASK_WORKER_NAME)"]
    service = {
        "type": "ClusterIP",
        "selector": {"dask.org/cluster-name": section.name, "dask.org/component": "scheduler"},
        "ports": [{"name": name, "port": port, "targetPort": name, "protocol": "TCP"} for name, port in PORTS.items()],
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": section.name, "namespace": section.namespace},
        "spec": {
            "idleTimeout": IDLE_TIMEOUT,
            "scheduler": {"spec": _pod(section, scheduler), "service": service},
            "worker": {
                "replicas": settings.workers,
                "spec": _pod(section, _worker_resources(section, _container(section, "worker", worker, threads(settings)))),
            },
        },
    }


def _worker_resources(section: KubernetesSettings, container: dict[str, Any]) -> dict[str, Any]:
    amounts = {"cpu": f"{section.cpus:g}", "memory": section.memory}
    gpus = {"nvidia.com/gpu": str(section.gpus)} if section.gpus else {}
    return {**container, "resources": {"requests": {**amounts, **gpus}, "limits": {**amounts, **gpus}}}


def _container(section: KubernetesSettings, name: str, command: list[str], environment: dict[str, Any]) -> dict[str, Any]:
    secret = {"envFrom": [{"secretRef": {"name": section.secret}}]} if section.secret else {}
    return {
        "name": name,
        "image": section.image,
        "args": command,
        "env": [{"name": key, "value": str(value)} for key, value in environment.items()],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": claim.name, "mountPath": str(claim.path)} for claim in section.claims],
        **secret,
    }


def _pod(section: KubernetesSettings, container: dict[str, Any]) -> dict[str, Any]:
    return {
        "containers": [container],
        "automountServiceAccountToken": False,
        "volumes": [{"name": claim.name, "persistentVolumeClaim": {"claimName": claim.name}} for claim in section.claims],
    }


def _section(settings: ClusterSettings) -> KubernetesSettings:
    assert settings.kubernetes is not None  # checked with the settings
    return settings.kubernetes
