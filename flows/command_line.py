"""What the commands share: the application, common arguments, and how errors are shown."""

import errno
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Chooses a bit-width for every layer of a vision network, by measuring how the quantization errors of layers interact.",
    epilog="docs/glossary.md explains words such as option, proposal and tile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as `clado init` writes.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, such as data.seed=1.", show_default=False),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/resnet20_fashion_mnist-1a2b3c4d.", show_default=False)
]
AverageBits = Annotated[float | None, typer.Option("--budget", metavar="BITS", help="Average bits per searched weight.")]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="KIND=BOUND[:CSV]", help="Another limit, such as bops=4e9 or latency=0.002:times.csv. May be repeated."
    ),
]
SizeBytes = Annotated[int | None, typer.Option("--size-bytes", metavar="BYTES", help="Bytes of the searched weights.")]


def _print_version(is_on: bool) -> None:
    if is_on:
        from clado import __version__

        typer.echo(f"clado {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


OF_FLOWS = ("dask", "distributed", "fastapi", "mlflow", "prefect", "sqlalchemy")
"""Libraries of the extra `flows`. The library part does not need them."""


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A command that shows a user's error as one message, without a traceback, and exits with a non-zero code."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        from clado.errors import CladoError

        try:
            return function(*args, **kwargs)
        except CladoError as error:
            from clado.settings.redaction import redact

            typer.echo(f"clado: {redact(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OF_FLOWS:
                raise
            expected = "expected: pip install 'clado[flows]'"
            typer.echo(f"clado: this command needs {error.name}, which is not installed; {expected}", err=True)
            raise typer.Exit(CladoError.exit_code) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # such an error names no file
            if error.filename is None and not full:
                raise
            what = f"{error.filename} cannot be used" if error.filename else "a file could not be written"
            advice = "; free disk space. What was measured is kept, and the same command continues from there" if full else ""
            typer.echo(f"clado: {what}: {error.strerror}{advice}", err=True)
            raise typer.Exit(CladoError.exit_code) from None
        except KeyboardInterrupt as error:
            from flows.guard import end_in_peace, farewell

            end_in_peace(type(error))
            text, code = farewell(type(error))
            typer.echo(text, err=True)
            raise typer.Exit(code) from None

    return app.command()(guarded)
