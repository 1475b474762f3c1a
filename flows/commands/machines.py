"""Commands about machines: certificates, what is installed, and services on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def certificates(
    folder: Annotated[Path, typer.Argument(help="Folder to write ca.pem, cert.pem and key.pem into.")],
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address of another machine. May be repeated.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days for which the certificates are valid.")] = 30,
) -> None:
    """Make certificates that encrypt Dask's connections, to try it out: an authority, and one that all machines share."""
    from flows.clusters._certificates import make_certificates

    files = make_certificates(folder, hosts or [], days)
    settings = ", ".join(f"{name}: {path}" for name, path in files.items())
    typer.echo(f"Wrote {len(files)} files, valid for {days} days. In the settings: cluster: {{tls: {{{settings}}}}}")


def doctor() -> None:
    """Print versions and devices, and whether the configured servers answer."""
    from flows.doctor import report

    text, healthy = report()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


ServicesFolder = Annotated[Path, typer.Option("--folder", help="Where the services keep their databases and logs.")]


def up(
    folder: ServicesFolder = Path("runs/services"),
    database: Annotated[
        str | None,
        typer.Option(
            envvar="CLADO_DATABASE",
            help="PostgreSQL server, postgresql://USER:PASSWORD@HOST:PORT; default: SQLite.",
            show_envvar=True,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Dask worker processes.")] = 2,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    dask_port: Annotated[
        int, typer.Option(min=1, max=65534, help="Port of the scheduler, which also uses the next port.")
    ] = 8786,
    timeout: Annotated[float, typer.Option(help="Seconds until a service must answer.")] = 300,
) -> None:
    """Start Prefect, MLflow and Dask on loopback. eval "$(clado up)" makes a shell use them."""
    from flows import services

    fresh = services.up(folder, services.Ports(prefect_port, mlflow_port, dask_port), workers, database, timeout)
    for name, value in services.exported(folder).items():
        typer.echo(f"export {name}={value}")
    typer.echo(
        ("Up. " if fresh else "Already running. ") + f"Logs and databases are in {folder}; stop them with: clado down"
        + ("" if folder == Path("runs/services") else f" --folder {folder}")
        + f"\nOpen http://{services.HOST}:{prefect_port} (Prefect) and http://{services.HOST}:{mlflow_port} (MLflow)."
        + "\nA run on it: clado run demo.yaml cluster.kind=address cluster.address=$DASK_SCHEDULER_ADDRESS"
        + "\nSchedules: prefect --no-prompt deploy --all", err=True,
    )  # fmt: skip


def down(folder: ServicesFolder = Path("runs/services")) -> None:
    """Stop the services that `clado up` started. Their databases are kept."""
    from flows import services

    ended = services.down(folder)
    typer.echo(f"Stopped {', '.join(ended)}." if ended else f"No service of {folder} was running.")
