"""Export: the network with an assignment's weights, as files that load without this package's settings or stores."""

import json
import re
from pathlib import Path

from clado.errors import ConfigurationError, StoreError
from clado.export.safetensors import ASSIGNMENT, export_network
from clado.export.snippets import PEERS, write_snippet
from clado.records import write_text
from clado.space import Assignment
from flows.session import Session

FORMATS = ("safetensors", "packed", "onnx", *PEERS)
PACKED, ONNX = "packed.safetensors", "network.onnx"
COMPARED_IMAGES = 1000  # of the validation set, in ONNX Runtime


def file_name(budget: str) -> str:
    """The name of a budget as that of a file or a folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", budget)


def budget_folder(session: Session, budget: str) -> Path:
    """Where the chosen network of a budget is exported."""
    return session.folder / "exports" / file_name(budget)


def model_folder(session: Session, budget: str) -> Path:
    """Where the chosen network of a budget is kept as MLflow gets it."""
    return session.folder / "models" / file_name(budget)


def check_format(kind: str) -> None:
    """Refuses a format that there is no export in."""
    if kind not in FORMATS:
        raise ConfigurationError(f"unknown format {kind!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def export_as(kind: str, session: Session, assignment: Assignment, folder: Path) -> tuple[Path, str]:
    """(what was written, what there is to say about it) of an assignment in a format."""
    if kind == "safetensors":
        return export(session, assignment, folder), ""
    if kind in PEERS:
        return write_snippet(folder, kind, session.space, assignment), ""
    network, layers = session.shipped(assignment)
    _put_assignment(folder, session, assignment)
    if kind == "packed":
        from clado.export.packed import export_packed

        file = folder / PACKED
        size = export_packed(file, network, layers)
        told = (
            f"{size.total_bytes:,} bytes of tensors, {size.weight_bytes:,} of them weights, and a header of {size.header_bytes:,}"
        )
        return file, f"{told}; load it with clado.load_packed({str(file)!r}, network)"
    from clado.export.onnx import compare, export_onnx

    file = folder / ONNX
    written = export_onnx(file, network, layers)
    kept = f"; {len(written.widened)} layers lie in a wider type" if written.widened else ""
    told = f"{written.file_bytes:,} bytes, {written.weight_bytes:,} of them weights{kept}"
    validation = session.slices.validation
    agreement = compare(file, network, layers, *validation.load(0, min(COMPARED_IMAGES, len(validation))))
    return file, f"{told}\n{agreement}"


def _put_assignment(folder: Path, session: Session, assignment: Assignment) -> None:
    """assignment.json beside an export; refused where another assignment's is there."""
    document, beside = session.space.to_json(assignment), folder / ASSIGNMENT
    if beside.is_file() and json.loads(beside.read_text(encoding="utf-8")) != document:
        raise StoreError(f"{folder} holds the export of another assignment; name another folder, or remove that one")
    write_text(beside, json.dumps(document, indent=1))


def export(session: Session, assignment: Assignment, folder: Path) -> Path:
    """The network with an assignment's weights: weights.safetensors, assignment.json, README.md with a loading snippet."""
    network, layers = session.shipped(assignment)
    state = network.state_dict(layers)
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
    pretrained = timm.get_pretrained_cfg(session.config.network.name)
    fixed = pretrained is not None and pretrained.fixed_input_size
    return f", in_chans={channels}" + (f", img_size={tuple(size)}" if fixed else "")
