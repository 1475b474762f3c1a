"""The metrics of a record: names and values that MLflow gets. Nothing here needs MLflow."""

import math
from collections.abc import Sequence

from clado.records.results import CHOSEN, Accuracy, Result
from clado.records.run_record import RunRecord
from clado.tracking.sending import key


def parent_metrics(record: RunRecord) -> dict[str, float | None]:
    """Metrics of a parent run: the float network, and the cost of measuring and choosing."""
    accuracy = record.float_accuracy
    return {
        "baseline": record.baseline,
        f"float_{record.top1_name}": accuracy.top1,
        **_interval(record, accuracy, "float_"),
        "float_top5": accuracy.top5,
        **own_metric(accuracy, "float_"),
        "float_validation_loss": accuracy.loss,
        "float_bytes": record.float_bytes,
        "validation_images": accuracy.num_images,
        **_served(record, "float", "runtime_float_"),
        "num_layers": len(record.layer_names),
        "num_weights": sum(record.layer_weights),
        **{f"seconds/{key(name)}": value for name, value in record.seconds.items()},
        **{f"forwards/{key(name)}": value for name, value in record.forwards.items()},
        **{f"costs/{key(name)}_{way}": value for name, cost in record.costs.items() for way, value in cost.items()},
    }


def child_metrics(record: RunRecord, result: Result) -> dict[str, float | None]:
    """Metrics of a nested run: one result."""
    accuracy = result.validation
    return {
        "size_bytes": result.size_bytes,
        "average_bits": result.average_bits,
        "loss_predicted": result.loss_predicted,
        "loss_deployed": result.loss_deployed,
        "brier_deployed": result.brier_deployed,
        "agreement_deployed": result.agreement_deployed,
        record.top1_name: accuracy.top1 if accuracy else None,
        **(_interval(record, accuracy) if accuracy else {}),
        "top5": accuracy.top5 if accuracy else None,
        **(own_metric(accuracy) if accuracy else {}),
        "validation_loss": accuracy.loss if accuracy else None,
        "validation_kl": accuracy.kl if accuracy else None,
        "validation_agreement": accuracy.agreement if accuracy else None,
        "validation_images": accuracy.num_images if accuracy else None,
        **_against(record, result),
        **(_served(record, result.budget, "runtime_") if result.method == CHOSEN else {}),
        "solver_objective": result.objective,
        "solver_bound": result.bound,
        "solver_gap": result.gap,
        "solver_seconds": result.seconds,
        "gain": result.gain,
    }


def _served(record: RunRecord, name: str, prefix: str) -> dict[str, float | None]:
    """Measurements of a network and of uniform bits in the runtime. Empty if the network was not measured."""
    rows = {} if record.serving is None else {served.name: served for served in record.serving.networks}
    if name not in rows:
        return {}
    served, uniform = rows[name], next((row for title, row in rows.items() if title.startswith("uniform")), None)
    return {
        f"{prefix}milliseconds": served.milliseconds,
        f"{prefix}milliseconds_predicted": served.predicted_milliseconds,
        f"{prefix}{record.top1_name}": served.top1,
        f"{prefix}file_bytes": served.file_bytes,
        f"{prefix}uniform_milliseconds": None if uniform is None else uniform.milliseconds,
    }


def own_metric(accuracy: Accuracy, prefix: str = "") -> dict[str, float | None]:
    """The user-defined metric under its name, in characters that MLflow allows. Nothing without one."""
    return {} if accuracy.metric_name is None else {key(f"{prefix}{accuracy.metric_name}"): accuracy.metric}


def _against(record: RunRecord, result: Result) -> dict[str, float | None]:
    """Differences from the chosen answer of the budget on the validation images: chosen minus this one, and both ends."""
    row = record.comparison(result.budget, CHOSEN, result.method)
    intervals = {} if row is None else {"top1": row.top1, "agreement": row.agreement, "kl": row.kl}
    return {
        f"chosen_minus_this/{name}{suffix}": value
        for name, interval in intervals.items()
        if interval is not None
        for suffix, value in (("", interval.mean), ("_low", interval.low), ("_high", interval.high))
    }


def _interval(record: RunRecord, accuracy: Accuracy, prefix: str = "") -> dict[str, float | None]:
    """Ends of top-1's confidence interval.

    With a part of ImageNet, also the number of its images.
    """
    name, (low, high) = f"{prefix}{record.top1_name}", accuracy.top1_interval or (None, None)
    count = {f"{name}_images": accuracy.num_images} if record.top1_name != "top1" else {}
    return {f"{name}_low": low, f"{name}_high": high, **count}


def curves(record: RunRecord, results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    """Accuracy and measured loss of every method over bytes.

    Bytes are the step, because they are whole numbers and every kind of budget has them. MLflow writes "Step" under its
    charts, so the names of the metrics say what it is.

    Args:
        record: The record of the run. It has the name of top-1.
        results: Results to draw.

    Returns:
        (bytes, value) of each metric, ordered by bytes. Values that are not finite are left out.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for result in sorted(results, key=lambda result: result.size_bytes):
        accuracy = result.validation
        values = {
            record.top1_name: accuracy.top1 if accuracy else None,
            **(own_metric(accuracy) if accuracy else {}),
            "validation_loss": accuracy.loss if accuracy else None,
            "loss_deployed": result.loss_deployed,
        }
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                series.setdefault(f"{name} over bytes/{result.method}", []).append((result.size_bytes, value))
    return series
