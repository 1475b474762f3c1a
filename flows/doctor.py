"""What is installed, which devices there are, and whether configured servers answer."""

import os
import platform
import urllib.request
from base64 import b64encode
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flows.environment import set_defaults

PACKAGES = ("clado", "torch", "torchvision", "numpy", "zarr", "dask", "distributed", "prefect", "mlflow", "pyscipopt")
SERVERS = {"PREFECT_API_URL": "/health", "MLFLOW_TRACKING_URI": "/health"}


def report() -> tuple[str, bool]:
    """Returns lines for the terminal, and whether everything necessary is installed and answers."""
    lines, healthy = [f"{'python':<12} {platform.python_version()} on {platform.platform()}"], True
    for package in PACKAGES:
        try:
            lines.append(f"{package:<12} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<12} missing: install clado again")
            healthy = False
    import torch

    lines.append(f"{'processor':<12} {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(k) for k in range(count))
    lines.append(f"{'GPUs':<12} {count}{': ' + names if count else ' (measuring runs on the processor)'}")
    set_defaults(Path("runs"))  # a Prefect profile may name a server
    for variable, path in SERVERS.items():
        uri = os.environ.get(variable, "")
        if not uri:
            lines.append(
                f"{variable:<12} not set: "
                + ("an embedded server is started" if "PREFECT" in variable else "sqlite:///mlflow.db in the working folder")
            )
            continue
        if not uri.startswith("http"):
            lines.append(f"{variable:<12} {_redacted(uri)}: no server to ask")
            continue
        reachable, answer = _answer(uri.rstrip("/") + path)
        lines.append(f"{variable:<12} {_redacted(uri)}: {answer}")
        healthy &= reachable
    return "\n".join(lines), healthy


def _answer(url: str) -> tuple[bool, str]:
    """(whether a server answers, a description of its answer)."""
    try:
        parts = urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request = urllib.request.Request(bare)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request.add_header("Authorization", f"Basic {b64encode(pair.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status == 200, f"answers ({response.status})"
    except (OSError, ValueError, HTTPException) as error:
        return False, f"does not answer ({_redacted(str(error))}); start it, or unset the variable"


def _redacted(uri: str) -> str:
    from clado.settings.redaction import redact

    return redact(uri)
