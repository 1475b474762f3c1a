"""Export: the network with an assignment's weights, as files that load without this package's settings or stores."""

import re
from pathlib import Path

from clado.export.safetensors import export_network
from clado.space import Assignment
from flows.session import Session


def budget_folder(session: Session, budget: str) -> Path:
    """Where the chosen network of a budget is exported."""
    return session.folder / "exports" / re.sub(r"[^A-Za-z0-9.-]+", "_", budget)


def export(session: Session, assignment: Assignment, folder: Path) -> Path:
    """The network with an assignment's weights: weights.safetensors, assignment.json, README.md with a loading snippet."""
    state = session.network.state_dict(session.bench.weights(assignment))
    return export_network(folder, state, session.space.to_json(assignment), loading_snippet(session))


def loading_snippet(session: Session) -> str:
    """Three lines that build the network and load the exported weights."""
    network = session.config.network
    build = {
        "zoo": f"from clado.zoo import NETWORKS; network = NETWORKS[{network.name!r}]()",
        "torchvision": f"import torchvision; network = torchvision.models.get_model({network.name!r}, weights=None)",
        "timm": f"import timm; network = timm.create_model({network.name!r}, pretrained=False{_timm_options(session)})",
        "factory": "from {} import {} as factory; network = factory()".format(*network.name.partition(":")[::2]),
    }[network.source]
    return "\n".join(
        (
            "from safetensors.torch import load_file",
            build,
            'network.load_state_dict(load_file("weights.safetensors"), strict=False)',
        )
    )


def _timm_options(session: Session) -> str:
    """The options that sources/timm.py built the network with, as further arguments."""
    if session.config.network.source != "timm" or session.config.network.image_shape is None:
        return ""
    import timm

    channels, *size = session.config.network.image_shape
    fixed = timm.get_pretrained_cfg(session.config.network.name).fixed_input_size
    return f", in_chans={channels}" + (f", img_size={tuple(size)}" if fixed else "")
