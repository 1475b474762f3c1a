"""The limits of every answer of a run, and the place of its measurements. Both follow from the settings."""

from dataclasses import replace
from pathlib import Path

from clado.choosing.constraints import Constraint, constraint
from clado.choosing.proposals import Budget, budgets_of
from clado.records.text import file_name
from clado.run.plugin_checks import check_constraint
from clado.settings.schema import ConstraintSettings, RunConfig
from clado.space import SearchSpace


def store_of(config: RunConfig) -> Path | str:
    """The place of a run's measurements: in its folder, or in a bucket."""
    return config.store or config.run_folder / "store.zarr"


def budgets_of_config(config: RunConfig) -> tuple[Budget, ...]:
    """The budgets that a configuration asks for."""
    table = None if config.runtime is None else latency_table(config, config.runtime.name)
    return budgets_of(**config.budgets.model_dump(), latency_table=table)


def latency_table(config: RunConfig, runtime: str) -> Path:
    """The CSV file of layer times. `clado profile` writes it and budgets read it."""
    configured = config.runtime.table if config.runtime is not None and config.runtime.name == runtime else None
    return configured or config.run_folder / "profile" / f"{file_name(runtime)}.csv"


def limits_of(config: RunConfig, space: SearchSpace) -> list[Constraint]:
    """The configuration's constraints on a space. A size that counts scales is another cost than the size of a budget."""
    return [limit_of(settings, config, space) for settings in config.constraints]


def limit_of(settings: ConstraintSettings, config: RunConfig, space: SearchSpace) -> Constraint:
    """One constraint of a configuration, or of a command line."""
    check_constraint(settings)
    if settings.scales:
        limit = constraint(settings.name, space, settings.bound, overhead_bytes=scale_bytes(config, space))
        return replace(limit, name=f"{settings.name}_with_scales")
    return Budget(settings.name, settings.bound, None if settings.path is None else str(settings.path)).limit(space)


def scale_bytes(config: RunConfig, space: SearchSpace) -> dict[str, int]:
    """Bytes of each layer's float32 scales, and of its 32-bit zero points under the affine scheme."""
    numbers = 2 if config.quantizer.scheme == "affine" else 1
    per_channel = config.quantizer.granularity == "per_channel"
    return {layer.name: 4 * numbers * (layer.num_channels if per_channel else 1) for layer in space.layers}
