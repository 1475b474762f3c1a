"""The `clado` command. Each body reads: check, open, call, print; libraries are imported when a command needs them."""

import atexit
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from clado.candidates import Budget
    from clado.config import RunConfig
    from flows.session import Session

BEGIN = time.perf_counter()
P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Chooses a bit-width for every layer of a vision network, by measuring how the quantization errors of layers interact.",
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
        "--limit", metavar="KIND=BOUND[:CSV]", help="A further limit, such as bops=4e9 or latency=0.002:times.csv. Repeatable."
    ),
]
SWEPT = ("average_bits", "size", "relative_size", "bops")
SizeBytes = Annotated[int | None, typer.Option("--size-bytes", metavar="BYTES", help="Bytes of the searched weights.")]


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A command whose user errors are one message and a non-zero exit, without a traceback."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        from clado.errors import CladoError

        try:
            return function(*args, **kwargs)
        except CladoError as error:
            typer.echo(f"clado: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.filename is None:
                raise
            typer.echo(f"clado: {error.filename} cannot be used: {error.strerror}", err=True)
            raise typer.Exit(CladoError.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("clado: interrupted; what was measured is kept, and the same command goes on from there", err=True)
            raise typer.Exit(130) from None

    return app.command()(guarded)


@command
def init(
    network: Annotated[
        str | None, typer.Option(help="package.module:factory of a function that returns a torch.nn.Module.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images: one sub-folder a class, or train/ and val/ of such.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("clado.yaml"),
) -> None:
    """Write a commented configuration."""
    from clado.errors import ConfigurationError
    from clado.records import write_text
    from clado.template import render

    if output.exists():
        raise ConfigurationError(f"{output} exists already; name another file with --output")
    write_text(output, render(network, None if data is None else str(data)))
    typer.echo(f"Wrote {output}. Next: clado run {output}")


@command
def run(config: Config, overrides: Overrides = None) -> None:
    """Measure, allocate, evaluate, record: the whole pipeline. Run it again to resume."""
    settings = _settings(config, overrides)
    clock: dict[str, float] = {}
    atexit.register(_report_end, clock)  # registered before Prefect's own hooks, hence run after them
    session = _session(settings)
    session.check()
    begin = time.perf_counter()
    clock["start-up"] = begin - BEGIN
    typer.echo(_plan_text(session), err=True)
    from flows.environment import make_home
    from flows.guard import orchestrated
    from flows.run import locked

    with locked(session.folder):  # refused here, where a message is enough, and held by the flow
        make_home()
    from flows.pipeline import pipeline

    clock["start-up"] += time.perf_counter() - begin
    entered = time.perf_counter()
    before = dict(clock)
    with orchestrated(lambda: clock == before):
        receipt = pipeline(settings.model_dump(mode="json"), clock)
    # what the flow's own phases do not cover is the orchestrator's start
    own = sum(clock.values()) - sum(before.values())
    clock["start-up"] += time.perf_counter() - entered - own
    _show(session.folder, clock, receipt)
    clock["printed"] = time.perf_counter()


@command
def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure for at most 20 s, to add an ETA.")] = False,
) -> None:
    """Say what a run will cost: evaluations, images, bytes. Measures nothing unless --probe is given."""
    session = _session(_settings(config, overrides))
    typer.echo(_plan_text(session))
    if probe:
        from flows.probe import eta_text

        typer.echo(eta_text(session))


@command
def solve(folder: RunFolder, budget: AverageBits = None, size_bytes: SizeBytes = None, limits: Limits = None) -> None:
    """Solve for a new budget from a run's stored measurements. Measures nothing, loads no network."""
    from clado.records import write_text
    from flows.stored import StoredRun, solution_text

    stored = StoredRun.open(folder)
    wanted = _budget(budget, size_bytes)
    for name, matrix, solution in stored.solve(wanted, limits or []):
        file = folder / "solutions" / f"{wanted.name.replace(' ', '_')}-{name}.json"
        write_text(file, stored.document(matrix, solution))
        rivals = stored.rivals(matrix, wanted, limits or [])
        others = ", ".join(f"{rival} {matrix.baseline + found.objective:.4f}" for rival, found in rivals.items())
        typer.echo(f"{solution_text(name, matrix, solution)}\n  on the same matrix: {others}\n  written to {file}")


@command
def evaluate(folder: RunFolder, budget: AverageBits = None, size_bytes: SizeBytes = None) -> None:
    """Top-1, top-5 and loss of a run's assignments; with a budget, of that budget's, measured now if they are new."""
    from flows.stored import StoredRun, evaluation_text

    stored = StoredRun.open(folder)
    wanted = None if budget is None and size_bytes is None else _budget(budget, size_bytes)
    typer.echo(evaluation_text(stored, _session(stored.config), wanted))


@command
def export(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; default: RUN/exports/BUDGET.")] = None,
    kind: Annotated[
        str, typer.Option("--format", help="safetensors, or the settings of a peer: modelopt, mct or torchao.")
    ] = "safetensors",
) -> None:
    """Write the network with the weights chosen for a budget, or a peer's Python file that applies the same bit-widths."""
    from clado.export.snippets import known, write_snippet
    from flows.export import budget_folder
    from flows.export import export as export_assignment
    from flows.stored import StoredRun, chosen_for

    peer = None if kind == "safetensors" else known(kind)
    stored, wanted = StoredRun.open(folder), _budget(budget, size_bytes)
    session = _session(stored.config)
    target = output or budget_folder(session, wanted.name)
    assignment = chosen_for(stored, session, wanted)
    if peer is None:
        export_assignment(session, assignment, target)
    else:
        target = write_snippet(target, peer, session.space, assignment)
    typer.echo(
        f"Wrote {target}: {session.space.size_bytes(assignment):,} bytes of weights when packed, "
        f"{session.space.average_bits(assignment):.3f} bits a weight"
    )


@command
def sweep(
    folder: RunFolder,
    budgets: Annotated[
        int, typer.Option("--budgets", min=2, help="How many, evenly from the narrowest bits to the widest.")
    ] = 20,
    kind: Annotated[str, typer.Option(help="average_bits, size, relative_size or bops.")] = "average_bits",
) -> None:
    """Solve a whole front of budgets from stored measurements and measure each answer's loss; table, plot, MLflow children."""
    from clado.errors import ConfigurationError
    from flows.stored import StoredRun

    if kind not in SWEPT:
        raise ConfigurationError(f"--kind {kind!r} cannot be swept; expected one of {', '.join(SWEPT)}")
    stored = StoredRun.open(folder)
    session = _session(stored.config)
    from flows.sweep import sweep as sweep_budgets

    text, receipt = sweep_budgets(stored, session, kind, budgets)
    typer.echo(f"{text}\nwritten to {folder / 'sweep'}; MLflow run {receipt.parent_run_id or 'not delivered'}")


@command
def smallest(
    folder: RunFolder,
    max_loss_increase: Annotated[float | None, typer.Option(help="Bound on the measured increase of the loss.")] = None,
    max_top1_drop: Annotated[float | None, typer.Option(help="Bound on the measured drop of top-1, in points.")] = None,
    max_predicted_increase: Annotated[
        float | None, typer.Option(help="Bound on the predicted increase: measures nothing.")
    ] = None,
) -> None:
    """Find the smallest network whose measured loss or accuracy stays under a bound, on images kept for this choice."""
    from clado.errors import ConfigurationError
    from flows.stored import StoredRun, solution_text

    if sum(bound is not None for bound in (max_loss_increase, max_top1_drop, max_predicted_increase)) != 1:
        raise ConfigurationError(
            "name one bound: --max-loss-increase X, --max-top1-drop POINTS, or --max-predicted-increase X (measures nothing)"
        )
    stored = StoredRun.open(folder)
    if max_predicted_increase is not None:
        for name, matrix, solution in stored.smallest_predicted(max_predicted_increase):
            typer.echo(solution_text(name, matrix, solution))
        return
    session = _session(stored.config)
    from flows.smallest import find, text

    top1 = max_top1_drop is not None
    bound = max_loss_increase if max_loss_increase is not None else (max_top1_drop or 0.0) / 100
    typer.echo(text(find(stored, session, bound, top1), session, top1))


@command
def score(folder: RunFolder, assignment: Annotated[Path, typer.Argument(metavar="FILE", help="Assignment as JSON.")]) -> None:
    """Score an assignment, ours or a peer's, on a run's matrices: predicted loss of each estimator, size, bits."""
    from clado.export.assignment import read_assignment
    from flows.stored import StoredRun, score_text

    stored = StoredRun.open(folder)
    typer.echo(score_text(stored, read_assignment(assignment, stored.measured.space)))


@command
def show(folder: RunFolder) -> None:
    """Print the table, the verdict and the places of a finished run."""
    _show(folder, {}, None)


@command
def doctor() -> None:
    """Print versions, devices, and whether the servers that are configured answer."""
    from flows.doctor import report

    text, healthy = report()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


def _settings(path: Path, overrides: list[str] | None) -> "RunConfig":
    from clado.config import load_config

    settings = load_config(path, overrides or [])
    from flows.environment import set_defaults

    set_defaults(settings.run_folder.parent)
    return settings


def _session(settings: "RunConfig") -> "Session":
    from flows.environment import set_defaults

    set_defaults(settings.run_folder.parent)
    from flows.session import Session

    return Session.open(settings)


def _budget(average_bits: float | None, size_bytes: int | None) -> "Budget":
    from clado.candidates import budgets_of
    from clado.errors import ConfigurationError

    if (average_bits is None) == (size_bytes is None):
        raise ConfigurationError("name one budget: --budget BITS (average bits a weight) or --size-bytes BYTES")
    return budgets_of([] if average_bits is None else [average_bits], [] if size_bytes is None else [size_bytes])[0]


def _plan_text(session: "Session") -> str:
    plan, space = session.plan, session.space
    lines = [
        f"{session.loaded.description}: {space.num_layers} layers, {space.num_options} options, "
        f"{space.num_weights:,} weights searched"
    ]
    for kind in plan.kinds:
        tiles = [tile for tile in plan.tiles if tile.kind == kind]
        evaluations = sum(plan.evaluations(tile) for tile in tiles) // len(plan.blocks)
        gmacs = sum(plan.macs(tile, session.workload) for tile in tiles) / 1e9
        lines.append(
            f"  {kind:<8} {evaluations:>7,} evaluations, {plan.forward_images(tiles):>11,} forward images, "
            f"{gmacs:>10,.0f} GMAC by suffixes, {len(tiles):>4} tiles"
        )
    smallest, largest = space.size_bytes(space.narrowest), space.size_bytes(space.widest)
    lines.append(
        f"  store {plan.stored_bytes() / 1e6:,.1f} MB before compression; sizes reachable {smallest:,} to {largest:,} bytes"
    )
    left = session.network.coverage()
    lines.append(
        f"  not searched: {len(left)} parameters, {sum(size for _, size, _ in left):,} bytes (biases, scales, fixed layers)"
    )
    return "\n".join(lines)


def _show(folder: Path, clock: dict[str, float], receipt: Any) -> None:
    from dataclasses import replace

    from rich.console import Console

    from clado import report
    from clado.records import RunRecord

    record = RunRecord.load(folder / "record.json")
    if clock:
        record = replace(record, seconds=dict(clock))
        record.save(folder / "record.json")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.show(record))
    typer.echo(report.locations(folder, sorted((folder / "plots").glob("*.png")), receipt))


def _report_end(clock: dict[str, float]) -> None:
    if "printed" in clock:
        shutdown = clock.get("shutdown", 0.0) + time.perf_counter() - clock["printed"]
        print(f"Shutdown took {shutdown:.1f} s; {time.perf_counter() - BEGIN:.0f} s in all.", file=sys.stderr)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
