"""The `clado` command. Each body reads: check, open, call, print; libraries are imported when a command needs them."""

import atexit
import math
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command_line import AverageBits, Config, Limits, Overrides, RunFolder, SizeBytes, app, command
from flows.commands import machines

if TYPE_CHECKING:
    from clado.choosing.proposals import Budget
    from clado.run.opened_run import OpenedRun
    from clado.settings.schema import RunConfig

BEGIN = time.perf_counter()
SWEPT = ("average_bits", "size", "relative_size", "bops")


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
    from clado.errors import ConfigurationError, NetworkError
    from clado.plugins import imported
    from clado.records.text import write_text
    from clado.settings.template import render, sizes

    if output.exists():
        raise ConfigurationError(f"{output} exists already; name another file with --output")
    of_data = None
    if network is not None and data is not None:
        from clado.data.sources.folder import listings

        imported(network, "factory", "function", NetworkError)
        training, validation = listings(data)
        of_data = sizes(len(training.images), validation is not None)
    write_text(output, render(network, None if data is None else str(data), of_data))
    typer.echo(f"Wrote {output}. Next: clado plan {output}, then clado run {output}")


@command
def run(config: Config, overrides: Overrides = None) -> None:
    """Measure, allocate, evaluate, record: the whole pipeline. Run it again to resume."""
    settings = _settings(config, overrides)
    clock: dict[str, float] = {}
    atexit.register(_report_end, clock)  # registered before Prefect's own hooks, hence run after them
    from flows.commands.run import run_flow

    run, receipt = run_flow(settings, clock, BEGIN)
    _show(run.folder, clock, receipt)
    clock["printed"] = time.perf_counter()


@command
def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure for at most 20 s, to add an ETA.")] = False,
    runtime: Annotated[str | None, typer.Option(help="Say what this runtime does not run natively, such as onnxruntime.")] = None,
) -> None:
    """Say what a run will cost: evaluations, images, bytes. Measures nothing unless --probe is given."""
    run = _opened(_settings(config, overrides), planning=not probe)
    from flows.commands.plan import plan_text

    typer.echo(plan_text(run))
    if runtime is not None:
        from clado.exporting.runtimes import runtime_of
        from flows.commands.profile import lacking_text

        typer.echo(lacking_text(run, runtime, runtime_of(runtime)))
    if (path := run.config.data.path) is not None and not path.exists():
        typer.echo(f"  images   {path} is not there: counted as asked for; the run needs it")
    if probe:
        own_start = time.perf_counter() - BEGIN
        from flows.commands.eta import eta_text

        typer.echo(eta_text(run, own_start))


@command
def profile(
    config: Config,
    overrides: Overrides = None,
    runtime: Annotated[str | None, typer.Option(help="What runs the networks; default: the settings', or onnxruntime.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: the settings', or 1.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one pass; seconds in the table are of one image.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="How often each network is timed; medians are taken.")] = 9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV to write; default: RUN/profile/RUNTIME.csv.")] = None,
) -> None:
    """Time every layer at every option on this machine: the table that budgets of latency read. Run it again to resume."""
    from clado.exporting.runtimes import runtime_of
    from clado.settings.schema import RuntimeSettings

    settings = _settings(config, overrides)
    named = settings.runtime or RuntimeSettings()
    name = runtime or named.name
    plugin = runtime_of(name)
    plugin.versions()  # refused before the network loads
    run = _opened(settings, planning=True)
    from clado.run.limits import latency_table
    from flows.commands.profile import lacking_text, profile_text
    from flows.commands.profile import profile as time_layers

    path = output or latency_table(settings, name)
    typer.echo(lacking_text(run, name, plugin), err=True)
    typer.echo(profile_text(run.space, time_layers(run, name, plugin, path, threads or named.threads, batch, turns), path))


@command
def solve(folder: RunFolder, budget: AverageBits = None, size_bytes: SizeBytes = None, limits: Limits = None) -> None:
    """Solve for a new budget from a run's stored measurements. Measures nothing, loads no network."""
    from clado.records.text import file_name, write_text
    from flows.commands.stored import StoredRun, limit_as_budget, predicted_text, solution_text

    stored, limits = StoredRun.open(folder), limits or []
    if budget is None and size_bytes is None and limits:
        row_budget, *limits = [limit_as_budget(limits[0]), *limits[1:]]
    else:
        row_budget = _budget(budget, size_bytes)
    for name, matrix, solution in stored.solve(row_budget, limits):
        file = folder / "solutions" / f"{'-'.join(map(file_name, [row_budget.name, *limits, name]))}.json"
        write_text(file, stored.document(matrix, solution, row_budget, limits))
        rivals = stored.rivals(matrix, row_budget, limits)
        others = ", ".join(f"{rival} {predicted_text(matrix, solution.objective)}" for rival, solution in rivals.items())
        typer.echo(f"{solution_text(name, matrix, solution)}\n  on the same matrix: {others}\n  written to {file}")
    typer.echo(_after_solving(folder, budget, size_bytes))


@command
def evaluate(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    per_class: Annotated[
        Path | None, typer.Option("--per-class", metavar="FILE", help="Write the accuracy of every class there, as CSV.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many validation images, for a quick look; not recorded.")
    ] = None,
) -> None:
    """Top-1, top-5 and loss of a run's assignments; with a budget, of that budget's, measured now if they are new."""
    from clado.records.text import write_text
    from flows.commands.stored import StoredRun, evaluated, evaluation_text, per_class_csv, track_evaluation
    from flows.guard import locked

    stored = StoredRun.open(folder)
    row_budget = None if budget is None and size_bytes is None else _budget(budget, size_bytes)
    run = _measured(stored.config)
    with locked(folder):
        rows = evaluated(stored, run, row_budget, images)
        typer.echo(evaluation_text(rows))
        if images is not None:
            return
        if per_class is not None:
            write_text(per_class, per_class_csv(run, rows))
            typer.echo(f"written to {per_class}")
        if receipt := track_evaluation(stored, rows, row_budget):
            typer.echo(f"MLflow run {receipt.parent_run_id or 'not delivered'}")


@command
def export(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; default: RUN/exports/BUDGET.")] = None,
    kind: Annotated[
        str, typer.Option("--format", help="safetensors, packed, onnx, or the settings of a peer: modelopt, mct or torchao.")
    ] = "safetensors",
) -> None:
    """Write the network with the weights chosen for a budget, or a peer's Python file that applies the same bit-widths."""
    from flows.commands.export import budget_folder, check_format, export_as
    from flows.commands.stored import StoredRun, chosen_for

    check_format(kind)
    stored, row_budget = StoredRun.open(folder), _budget(budget, size_bytes)
    run = _measured(stored.config)
    assignment = chosen_for(stored, run, row_budget)
    target, told = export_as(kind, run, assignment, output or budget_folder(run, row_budget.name))
    typer.echo(
        f"Wrote {target}: {run.space.size_bytes(assignment):,} bytes of weights when packed, "
        f"{run.space.average_bits(assignment):.3f} bits a weight" + (f"\n{told}" if told else "")
    )


@command
def deploy(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    latency: Annotated[
        float | None, typer.Option("--latency", metavar="SECONDS", help="A budget of the settings' budgets.latency.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="What serves the network.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Validation images that accuracy is counted on, at most.")] = 1000,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: RUN/deployments/BUDGET.")
    ] = None,
) -> None:
    """Write the network chosen for a budget as a folder that a runtime serves; measure size, accuracy and milliseconds there."""
    from clado.exporting.runtimes import runtime_of
    from clado.records.text import file_name
    from flows.commands.stored import StoredRun, chosen_for, latency_budget
    from flows.guard import locked

    plugin = runtime_of(runtime)
    plugin.versions()  # refused before the network loads
    stored = StoredRun.open(folder)
    row_budget = latency_budget(stored, latency) if latency is not None else _budget(budget, size_bytes)
    run = _measured(stored.config)
    from flows.commands.deploy import deploy as write

    target = output or folder / "deployments" / file_name(row_budget.name)
    with locked(folder):
        text = write(run, runtime, plugin, chosen_for(stored, run, row_budget), target, threads, images)
    typer.echo(f"{text}\nWrote {target}. Try it: python {target / 'predict.py'} IMAGE")


@command
def finetune(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Training set: a folder of idx files (Fashion-MNIST's) or of images; default: the run's own images."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="kl_to_float distils from the float network; cross_entropy learns from labels.")
    ] = "kl_to_float",
    epochs: Annotated[int, typer.Option(help="At most; fewer where held-out images get no better.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Adam's at first; it falls to zero.")] = 1e-3,
    batch_images: Annotated[int, typer.Option(help="Images of one step.")] = 64,
    patience: Annotated[int, typer.Option(help="Epochs without a lower held-out loss until it ends.")] = 2,
    images: Annotated[int | None, typer.Option(help="At most so many training images; default: all.")] = None,
    learned_scales: Annotated[bool, typer.Option("--learned-scales", help="Train the grids' scales too (LSQ).")] = False,
    augment: Annotated[bool, typer.Option(help="Shift and mirror images at random.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out images, the batches and the augmentation.")] = 0,
) -> None:
    """Train the network chosen for a budget on its grids for a few epochs; evaluate it, write it packed, record it."""
    from clado.quantization.training import Training
    from flows.commands.stored import StoredRun, chosen_for

    row_budget = _budget(budget, size_bytes)
    training = Training(epochs, criterion, learning_rate, batch_images, patience, learned_scales, augment, seed)
    stored = StoredRun.open(folder)
    run = _measured(stored.config)
    from flows.commands.finetune import images_of, train
    from flows.guard import locked

    if data is None:
        from clado.run.checks import with_readable_selection

        run = with_readable_selection(run)

    chosen_images = images_of(run, data, seed, images, labels=training.objective(run.float_network).needs_targets)
    with locked(folder):
        text, receipt = train(stored, run, row_budget.name, chosen_for(stored, run, row_budget), training, chosen_images)
    parent = "none: the run has no record yet" if receipt is None else receipt.parent_run_id or "not delivered"
    typer.echo(f"{text}\nMLflow run {parent}")


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
    from flows.commands.stored import StoredRun

    if kind not in SWEPT:
        raise ConfigurationError(f"--kind {kind!r} cannot be swept; expected one of {', '.join(SWEPT)}")
    stored = StoredRun.open(folder)
    run = _measured(stored.config)
    from flows.commands.sweep import sweep as sweep_budgets
    from flows.guard import locked

    with locked(folder):
        text, receipt = sweep_budgets(stored, run, kind, budgets)
    typer.echo(f"{text}\nwritten to {folder / 'sweep'}; MLflow run {receipt.parent_run_id or 'not delivered'}")


@command
def smallest(
    folder: RunFolder,
    max_loss_increase: Annotated[float | None, typer.Option(help="Bound on the measured increase of the loss.")] = None,
    max_top1_drop: Annotated[float | None, typer.Option(help="Bound on the measured drop of top-1, in points.")] = None,
    max_metric_drop: Annotated[
        float | None, typer.Option(help="Bound on the measured drop of the run's metric, in its own unit.")
    ] = None,
    max_predicted_increase: Annotated[
        float | None, typer.Option(help="Bound on the predicted increase: measures nothing.")
    ] = None,
) -> None:
    """Find the smallest network whose measured loss or accuracy stays under a bound, on images kept for this choice."""
    from clado.errors import ConfigurationError
    from flows.commands.stored import StoredRun, solution_text

    given = (max_loss_increase, max_top1_drop, max_metric_drop, max_predicted_increase)
    bounds = [bound for bound in given if bound is not None]
    if len(bounds) != 1 or not math.isfinite(bounds[0]):
        raise ConfigurationError(
            "name one bound, a number: --max-loss-increase X, --max-top1-drop POINTS, --max-metric-drop X, or "
            "--max-predicted-increase X (measures nothing)"
        )
    stored = StoredRun.open(folder)
    if max_predicted_increase is not None:
        for name, matrix, solution in stored.smallest_predicted(max_predicted_increase):
            typer.echo(solution_text(name, matrix, solution))
        return
    from clado.run.checks import with_readable_selection

    run = with_readable_selection(_measured(stored.config))
    from flows.commands.smallest import find, text

    top1, metric = max_top1_drop is not None, max_metric_drop is not None
    bound = bounds[0] / 100 if top1 else bounds[0]
    typer.echo(text(find(stored, run, bound, top1, metric), run, top1, metric))


@command
def score(folder: RunFolder, assignment: Annotated[Path, typer.Argument(metavar="FILE", help="Assignment as JSON.")]) -> None:
    """Score an assignment, ours or a peer's, on a run's matrices: predicted loss of each estimator, size, bits."""
    from clado.exporting.assignment import read_assignment
    from flows.commands.stored import StoredRun, score_text

    stored = StoredRun.open(folder)
    typer.echo(score_text(stored, read_assignment(assignment, stored.measured.space)))


@command
def sync(
    folder: RunFolder,
    uri: Annotated[str | None, typer.Option(help="Another MLflow than the run's tracking.uri, such as http://HOST:5000.")] = None,
) -> None:
    """Deliver to MLflow what it has not got of a run, from the run's folder alone. A second time delivers nothing."""
    from clado.errors import ServerError, StoreError
    from clado.records.text import write_text
    from clado.settings.loading import load_run_config
    from clado.tracking.delivery import deliver
    from flows.guard import locked

    settings = load_run_config(folder, uri)
    with locked(folder):
        receipts = deliver(folder, settings.model_dump(mode="json"), settings.tracking.uri)
        if receipts and all(receipt.delivered for receipt in receipts):
            write_text(folder / "config.yaml", settings.to_yaml())  # what comes later goes to the same MLflow
    for receipt in receipts:
        if not receipt.delivered:
            raise ServerError(
                f"MLflow at {receipt.uri} did not take it ({receipt.problem}); it is kept in {receipt.spool}: start the "
                "tracker, or name another with --uri, and sync again"
            )
        typer.echo(f"Delivered to {receipt.uri}: run {receipt.parent_run_id}, {receipt.num_children} below it")
    if not receipts and not (folder / "record.json").is_file():
        raise StoreError(f"{folder} has no record yet to deliver; clado run {folder / 'config.yaml'} goes on with it")
    if not receipts:
        typer.echo(f"Nothing to deliver: MLflow has all of {folder}")


@command
def show(
    folder: RunFolder,
    details: Annotated[bool, typer.Option("--details", help="Print all that is recorded, notes and seconds included.")] = False,
    proposals: Annotated[bool, typer.Option("--proposals", help="Print every proposal, predicted and measured.")] = False,
) -> None:
    """Print what a finished run found, what it recommends, and where its report is."""
    if proposals:
        from clado.records.run_record import RunRecord
        from clado.reporting import tables

        record = RunRecord.load(folder / "record.json")
        typer.echo(f"{tables.proposals_table(record)}\n\n{tables.search_text(record)}".rstrip())
        return
    _show(folder, {}, None, details)


@command
def report(folder: RunFolder) -> None:
    """Write a run as one self-contained HTML page: front, table, bits, interactions, coverage, provenance."""
    from clado.reporting.page import write

    typer.echo(f"Wrote {write(folder)}")


@command
def cluster(config: Config, overrides: Overrides = None) -> None:
    """Say what workers a configuration would start; for SLURM the batch script, for Kubernetes the manifest. Starts nothing."""
    settings = _settings(config, overrides)
    from flows import clusters

    typer.echo(clusters.describe(settings))


for function in (machines.certificates, machines.doctor, machines.up, machines.down):
    command(function)


def _settings(path: Path, overrides: list[str] | None) -> "RunConfig":
    from clado.settings.loading import load_config

    settings = load_config(path, overrides or [])
    from flows.environment import set_defaults

    set_defaults(settings.run_folder.parent)
    return settings


def _opened(settings: "RunConfig", planning: bool = False) -> "OpenedRun":
    from flows.environment import set_defaults

    set_defaults(settings.run_folder.parent)
    from clado.run.opened_run import open_run

    return open_run(settings, planning=planning)


def _measured(settings: "RunConfig") -> "OpenedRun":
    """A run that was measured, opened again; refused where network, images or settings are no longer those of its store."""
    run = _opened(settings)
    run.identity.check_measured()
    return run


def _after_solving(folder: Path, average_bits: float | None, size_bytes: int | None) -> str:
    """What to do with predictions."""
    option = f"--size-bytes {size_bytes}" if size_bytes is not None else f"--budget {average_bits:g}" if average_bits else ""
    told = "Predictions of different estimators do not compare; what is measured does."
    return f"{told}\nNext: clado evaluate {folder} {option} measures these answers and chooses one." if option else told


def _budget(average_bits: float | None, size_bytes: int | None) -> "Budget":
    from clado.choosing.proposals import budgets_of
    from clado.errors import ConfigurationError

    if (average_bits is None) == (size_bytes is None):
        raise ConfigurationError("name one budget: --budget BITS (average bits a weight) or --size-bytes BYTES")
    if average_bits is not None and not (math.isfinite(average_bits) and average_bits > 0):
        raise ConfigurationError(f"--budget is {average_bits}; expected a number of bits above 0, such as 3 or 2.75")
    return budgets_of([] if average_bits is None else [average_bits], [] if size_bytes is None else [size_bytes])[0]


def _show(folder: Path, clock: dict[str, float], receipt: Any, details: bool = False) -> None:
    from dataclasses import replace

    from rich.console import Console

    from clado.records.run_record import RunRecord
    from clado.reporting import page, summary, tables
    from clado.tracking.notes import last_receipt

    record = RunRecord.load(folder / "record.json")
    if clock:
        record = replace(record, seconds=dict(clock))
        record.save(folder / "record.json")
        page.write(folder)
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)
    console.print(tables.show(record) if details else summary.summary(record))
    typer.echo(tables.locations(folder, receipt or last_receipt(folder)))
    typer.echo(summary.recommendation(record, folder))


def _report_end(clock: dict[str, float]) -> None:
    if "printed" in clock:
        shutdown = clock.get("shutdown", 0.0) + time.perf_counter() - clock["printed"]
        whole = time.perf_counter() - BEGIN
        print(f"Start-up took {clock['start-up']:.1f} s, shutdown {shutdown:.1f} s; {whole:.0f} s in all.", file=sys.stderr)


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # else a terminal of another encoding ends the command at its first ± or –
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
