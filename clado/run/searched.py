"""The search space of a run: the layers of its network with the candidates of its settings."""

from clado.exporting.native import native_space, native_text
from clado.exporting.runtimes import runtime_of
from clado.network.network import Network
from clado.settings.schema import RunConfig
from clado.space import SearchSpace


def offered_space(config: RunConfig, network: Network) -> SearchSpace:
    """Every candidate that the settings name."""
    space = network.search_space(config.bits).restricted(config.layers.bits).tied(config.layers.ties)
    space = space.blocked(config.layers.blocks)
    return space.with_activations(config.activations.bits) if config.activations.bits else space


def search_space(config: RunConfig, network: Network) -> SearchSpace:
    """The candidates that are searched: all, or those that the runtime of the settings runs natively."""
    space = offered_space(config, network)
    if config.runtime is None or config.runtime.candidates == "all":
        return space
    return native_space(space, runtime_of(config.runtime.name), is_symmetric(config))


def runtime_note(config: RunConfig, network: Network, searched: SearchSpace) -> str | None:
    """What the runtime of the settings does not run natively; None where there is no runtime, or it runs all."""
    if config.runtime is None:
        return None
    return native_text(offered_space(config, network), searched, runtime_of(config.runtime.name), is_symmetric(config))


def is_symmetric(config: RunConfig) -> bool:
    """Whether weights have the symmetric scheme."""
    return config.quantizer.scheme == "symmetric"
