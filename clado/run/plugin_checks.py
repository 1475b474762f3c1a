"""Checks of settings that depend on plug-ins. They are made when a run is opened, before anything is started or written."""

from clado.choosing.constraints import kind_of
from clado.choosing.solvers import solver_of
from clado.criteria import criterion_of
from clado.errors import ConfigurationError
from clado.exporting.runtimes import runtime_of
from clado.interaction.estimators import estimator_of
from clado.quantization.preparation import check_rounding
from clado.quantization.quantizers import quantizer_of
from clado.settings.schema import ConstraintSettings, RunConfig


def check_plugins(config: RunConfig) -> None:
    """Loads every plug-in that the settings name, and checks the settings that depend on them.

    Raises:
        ConfigurationError: A plug-in is missing, is not a plug-in, or does not fit the other settings.
    """
    criterion_of(config.criterion)
    solver_of(config.solver.name)
    quantizer_of(config.quantizer.weights)
    quantizer_of(config.activations.range)
    check_rounding(config.corrections)
    for name in config.estimators:
        _check_estimator(name, config)
    for settings in config.constraints:
        check_constraint(settings)
    if config.runtime is not None:
        runtime_of(config.runtime.name)


def _check_estimator(name: str, config: RunConfig) -> None:
    estimator = estimator_of(name)
    if estimator.sees_weights_only and len(config.activations.bits) > 1:
        raise ConfigurationError(
            f"estimator {name} covers errors of weights only. Of activations.bits {list(config.activations.bits)} "
            "the narrowest would look as good as the widest; expected one width, none, or other estimators"
        )
    if estimator.needs_single_images and config.measure.batch_statistics:
        raise ConfigurationError(
            f"estimator {name} needs the gradient of every single image, which measure.batch_statistics mixes; "
            "expected batch_statistics: false, or other estimators"
        )


def check_constraint(settings: ConstraintSettings) -> None:
    """Checks the file of a constraint, and whether it counts scales.

    Raises:
        ConfigurationError: A file is missing or not read by the constraint, or the constraint ignores scales.
    """
    kind = kind_of(settings.name)
    if settings.scales and not kind.counts_bytes:
        raise ConfigurationError(f"constraints: scales counts bytes; expected with kind size, not {settings.name}")
    if kind.needs_path != (settings.path is not None):
        asks = "needs" if kind.needs_path else "takes no"
        raise ConfigurationError(f"constraints: kind {settings.name} {asks} path: FILE.csv with layer,bits,UNIT")
