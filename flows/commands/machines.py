"""Commands about machines: certificates, what is installed, and the services that run on this one."""

from pathlib import Path
from typing import Annotated

import typer


def certificates(
    folder: Annotated[Path, typer.Argument(help="Folder to write ca.pem, cert.pem and key.pem into.")],
    hosts: Annotated[list[str] | None, typer.Option("--host", help="A machine beside this one, by name or address.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they hold.")] = 30,
) -> None:
    """Make certificates to encrypt Dask's connections with, for trying it out: an authority, and one for every machine."""
    from flows.clusters._certificates import make_certificates

    files = make_certificates(folder, hosts or [], days)
    settings = ", ".join(f"{name}: {path}" for name, path in files.items())
    typer.echo(f"Wrote {len(files)} files, valid for {days} days. In the settings: cluster: {{tls: {{{settings}}}}}")


def doctor() -> None:
    """Print versions, devices, and whether the servers that are configured answer."""
    from flows.doctor import report

    text, healthy = report()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


ServicesFolder = Annotated[Path, typer.Option("--folder", help="Where the services keep what they store and print.")]


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
    dask_port: Annotated[int, typer.Option(min=1, max=65534, help="Of the scheduler; it takes the next one too.")] = 8786,
    timeout: Annotated[float, typer.Option(help="Seconds until a service that is not well is given up.")] = 300,
) -> None:
    """Start Prefect, MLflow and Dask on this machine, on loopback: eval "$(clado up)" sets the environment of a shell."""
    from flows import services

    fresh = services.up(folder, services.Ports(prefect_port, mlflow_port, dask_port), workers, database, timeout)
    for name, value in services.exported(folder).items():
        typer.echo(f"export {name}={value}")
    typer.echo(
        ("Up. " if fresh else "Already up. ") + f"Logs and databases are in {folder}; end it with: clado down"
        + ("" if folder == Path("runs/services") else f" --folder {folder}")
        + f"\nOpen http://{services.HOST}:{prefect_port} (Prefect) and http://{services.HOST}:{mlflow_port} (MLflow)."
        + "\nA run on it: clado run demo.yaml cluster.kind=address cluster.address=$DASK_SCHEDULER_ADDRESS"
        + "\nSchedules: prefect --no-prompt deploy --all", err=True,
    )  # fmt: skip


def down(folder: ServicesFolder = Path("runs/services")) -> None:
    """End what `clado up` started; what it stored is kept."""
    from flows import services

    ended = services.down(folder)
    typer.echo(f"Ended {', '.join(ended)}." if ended else f"Nothing of {folder} was running.")
