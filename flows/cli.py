"""The `clado` command. Each command checks, opens, calls and prints. It imports libraries when it needs them."""

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
        Path | None, typer.Option(help="Folder of images: a sub-folder for each class, or train/ and val/ with such sub-folders.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("clado.yaml"),
) -> None:
    """Write settings with comments (YAML)."""
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
    atexit.register(_report_end, clock)  # registered before Prefect's own hooks, so it runs after them
    from flows.commands.run import run_flow

    run, receipt = run_flow(settings, clock, BEGIN)
    _show(run.folder, clock, receipt)
    clock["printed"] = time.perf_counter()


@command
def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure for at most 20 s, to estimate how long the run takes.")] = False,
    runtime: Annotated[
        str | None, typer.Option(help="List the options that a runtime, such as onnxruntime, does not run natively.")
    ] = None,
) -> None:
    """Print what a run will cost: evaluations, images, bytes. Measures nothing unless --probe is given."""
    run = _opened(_settings(config, overrides), planning=not probe)
    from clado.choosing.proposals import check_budgets
    from flows.commands.plan import plan_text

    check_budgets(run.space, run.budgets, run.limits)
    typer.echo(plan_text(run))
    if runtime is not None:
        from clado.exporting.runtimes import runtime_of
        from flows.commands.profile import lacking_text

        typer.echo(lacking_text(run, runtime, runtime_of(runtime)))
    if (path := run.config.data.path) is not None and not path.exists():
        typer.echo(f"  images   {path} does not exist. Costs are for the number of images in the settings")
    if probe:
        own_start = time.perf_counter() - BEGIN
        from flows.commands.eta import eta_text

        typer.echo(eta_text(run, own_start))


@command
def profile(
    config: Config,
    overrides: Overrides = None,
    runtime: Annotated[
        str | None, typer.Option(help="Runtime that runs the networks; default: the settings', or onnxruntime.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: the settings', or 1.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one pass. The table has the seconds of one image.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="How often each network is timed. The table has medians.")] = 9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV file; default: RUN/profile/RUNTIME.csv.")] = None,
) -> None:
    """Time every layer at every option on this machine, for budgets of latency. Run it again to resume."""
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
    from flows.commands.advice import after_solving
    from flows.commands.stored import StoredRun, limit_as_budget, predicted_text, solution_text

    stored, limits = StoredRun.open(folder), limits or []
    if budget is None and size_bytes is None and limits:
        row_budget, *limits = [limit_as_budget(limits[0]), *limits[1:]]
    else:
        row_budget = _budget(budget, size_bytes)
    answers = {}
    for name, matrix, solution in stored.solve(row_budget, limits):
        answers[name] = solution
        file = folder / "solutions" / f"{'-'.join(map(file_name, [row_budget.name, *limits, name]))}.json"
        write_text(file, stored.document(matrix, solution, row_budget, limits))
        rivals = stored.rivals(matrix, row_budget, limits)
        others = ", ".join(f"{rival} {predicted_text(matrix, solution.objective)}" for rival, solution in rivals.items())
        typer.echo(f"{solution_text(name, matrix, solution)}\n  on the same matrix: {others}\n  written to {file}")
    typer.echo(after_solving(stored, answers))


@command
def evaluate(
    folder: RunFolder,
    budget: AverageBits = None,
    size_bytes: SizeBytes = None,
    per_class: Annotated[
        Path | None, typer.Option("--per-class", metavar="FILE", help="CSV file to write the accuracy of each class to.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Use this many validation images only, for a quick look. Nothing is recorded.")
    ] = None,
) -> None:
    """Print top-1, top-5 and loss of a run's assignments, or of one budget's. New assignments are measured now."""
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
        str, typer.Option("--format", help="safetensors, packed or onnx; for another library: modelopt, mct or torchao.")
    ] = "safetensors",
) -> None:
    """Write the network chosen for a budget, or a Python file that applies its bit-widths with another library."""
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
    runtime: Annotated[str, typer.Option(help="Runtime that runs the network.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Most validation images to count accuracy on.")] = 1000,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: RUN/deployments/BUDGET.")
    ] = None,
) -> None:
    """Write the network chosen for a budget as a folder for a runtime. Measure size, accuracy and time in that runtime."""
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
        typer.Option(help="Training set: a folder of images, or of idx files like Fashion-MNIST's; default: the run's images."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="kl_to_float learns from the float network, cross_entropy from labels.")
    ] = "kl_to_float",
    epochs: Annotated[int, typer.Option(help="Most epochs. Training ends earlier if held-out images do not improve.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="First learning rate of Adam; it falls to zero.")] = 1e-3,
    batch_images: Annotated[int, typer.Option(help="Images of a training batch.")] = 64,
    patience: Annotated[int, typer.Option(help="End after this many epochs without a lower held-out loss.")] = 2,
    images: Annotated[int | None, typer.Option(help="Most training images; default: all.")] = None,
    learned_scales: Annotated[bool, typer.Option("--learned-scales", help="Train the grids' scales too (LSQ).")] = False,
    augment: Annotated[bool, typer.Option(help="Shift and mirror images at random.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the held-out images, the batches and the augmentation.")] = 0,
) -> None:
    """Train the quantized network of a budget for a few epochs. Evaluate it, write it packed, record it."""
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
        int, typer.Option("--budgets", min=2, help="Number of budgets, evenly spaced from the narrowest bits to the widest.")
    ] = 20,
    kind: Annotated[str, typer.Option(help="Kind of budget: average_bits, size, relative_size or bops.")] = "average_bits",
) -> None:
    """Solve for many budgets from stored measurements, and measure the loss of each answer. Write a table and plots."""
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
    max_loss_increase: Annotated[float | None, typer.Option(help="Largest allowed increase of the measured loss.")] = None,
    max_top1_drop: Annotated[float | None, typer.Option(help="Largest allowed drop of measured top-1, in points.")] = None,
    max_metric_drop: Annotated[
        float | None, typer.Option(help="Largest allowed drop of the run's metric, in the unit of the metric.")
    ] = None,
    max_predicted_increase: Annotated[
        float | None, typer.Option(help="Largest allowed increase of the predicted loss. Measures nothing.")
    ] = None,
) -> None:
    """Find the smallest network that keeps a bound on its measured loss or accuracy, on images reserved for this."""
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
        from flows.commands.advice import after_solving

        answers = {}
        for name, matrix, solution in stored.smallest_predicted(max_predicted_increase):
            answers[name] = solution
            typer.echo(solution_text(name, matrix, solution))
        typer.echo(after_solving(stored, answers))
        return
    from clado.run.checks import with_readable_selection

    run = with_readable_selection(_measured(stored.config))
    from flows.commands.smallest import find, text

    top1, metric = max_top1_drop is not None, max_metric_drop is not None
    bound = bounds[0] / 100 if top1 else bounds[0]
    typer.echo(text(find(stored, run, bound, top1, metric), run, top1, metric))


@command
def score(folder: RunFolder, assignment: Annotated[Path, typer.Argument(metavar="FILE", help="Assignment as JSON.")]) -> None:
    """Print what each of a run's estimators predicts for an assignment of clado or of another library."""
    from clado.exporting.assignment import read_assignment
    from flows.commands.advice import after_scoring
    from flows.commands.stored import StoredRun, score_text

    stored = StoredRun.open(folder)
    bits = read_assignment(assignment, stored.measured.space)
    typer.echo(f"{score_text(stored, bits)}\n{after_scoring(stored, bits)}")


@command
def sync(
    folder: RunFolder,
    uri: Annotated[str | None, typer.Option(help="Another MLflow, such as http://HOST:5000; default: tracking.uri.")] = None,
) -> None:
    """Send to MLflow what is missing there of a run. It reads only the run's folder. A second call sends nothing."""
    from clado.errors import ServerError, StoreError
    from clado.records.text import write_text
    from clado.settings.loading import load_run_config
    from clado.tracking.delivery import deliver
    from flows.guard import locked

    settings = load_run_config(folder, uri)
    with locked(folder):
        receipts = deliver(folder, settings.model_dump(mode="json"), settings.tracking.uri)
        if receipts and all(receipt.delivered for receipt in receipts):
            write_text(folder / "config.yaml", settings.to_yaml())  # later commands send to the same MLflow
    for receipt in receipts:
        if not receipt.delivered:
            raise ServerError(
                f"MLflow at {receipt.uri} did not take the record ({receipt.problem}). It is still in {receipt.spool}: start the "
                "tracker, or name another with --uri, and sync again"
            )
        typer.echo(f"Delivered to {receipt.uri}: run {receipt.parent_run_id}, {receipt.num_children} below it")
    if not receipts and not (folder / "record.json").is_file():
        raise StoreError(f"{folder} has no record yet to deliver; clado run {folder / 'config.yaml'} continues it")
    if not receipts:
        typer.echo(f"Nothing to deliver: MLflow has all of {folder}")


@command
def show(
    folder: RunFolder,
    details: Annotated[bool, typer.Option("--details", help="Print all that is recorded, with notes and seconds.")] = False,
    proposals: Annotated[bool, typer.Option("--proposals", help="Print every proposal with both of its losses.")] = False,
) -> None:
    """Print the results of a finished run, its recommendation, and where its report is."""
    if proposals:
        from clado.records.run_record import RunRecord
        from clado.reporting import tables

        record = RunRecord.load(folder / "record.json")
        typer.echo(f"{tables.proposals_table(record)}\n\n{tables.search_text(record)}".rstrip())
        return
    _show(folder, {}, None, details)


@command
def report(folder: RunFolder) -> None:
    """Write the report of a run: one HTML page with plots, tables, bits, interactions and versions."""
    from clado.reporting.page import write

    typer.echo(f"Wrote {write(folder)}")


@command
def cluster(config: Config, overrides: Overrides = None) -> None:
    """Print the workers that settings would start: for SLURM the batch script, for Kubernetes the manifest. Starts nothing."""
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
    """Opens a measured run again. It is refused if its network, images or settings differ from those of its store."""
    run = _opened(settings)
    run.identity.check_measured()
    return run


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
        if isinstance(stream, TextIOWrapper):  # otherwise a terminal with another encoding fails at the first ± or –
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
