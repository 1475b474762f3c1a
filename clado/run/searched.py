"""The search space of a run: the layers of its network with the candidates of its settings."""

from clado.exporting.native import native_space, native_text
from clado.exporting.runtimes import runtime_of
from clado.network.network import Network
from clado.settings.schema import RunConfig
from clado.space import SearchSpace


def offered_space(config: RunConfig, network: Network) -> SearchSpace:
    """The space of all candidates that the settings name."""
    space = network.search_space(config.bits).restricted(config.layers.bits).tied(config.layers.ties)
    space = space.blocked(config.layers.blocks)
    return space.with_activations(config.activations.bits) if config.activations.bits else space


def search_space(config: RunConfig, network: Network) -> SearchSpace:
    """The searched space: all candidates, or only those that the runtime of the settings runs natively."""
    space = offered_space(config, network)
    if config.runtime is None or config.runtime.candidates == "all":
        return space
    return native_space(space, runtime_of(config.runtime.name), is_symmetric(config))


def runtime_note(config: RunConfig, network: Network, searched: SearchSpace) -> str | None:
    """Says which candidates the runtime does not run natively. None without a runtime, or if it runs all."""
    if config.runtime is None:
        return None
    return native_text(offered_space(config, network), searched, runtime_of(config.runtime.name), is_symmetric(config))


def is_symmetric(config: RunConfig) -> bool:
    """Whether weights are quantized with the symmetric scheme."""
    return config.quantizer.scheme == "symmetric"
