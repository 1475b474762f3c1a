"""Export: the network with an assignment's weights, in files that load without settings or stores of clado."""

import json
from dataclasses import replace
from pathlib import Path

from clado.data import zoo
from clado.data.decoding import EncodedSlice
from clado.errors import ConfigurationError, StoreError
from clado.evaluation import Counts, count_each
from clado.exporting._torch_module import as_layers, as_module
from clado.exporting.safetensors import ASSIGNMENT, export_network
from clado.exporting.snippets import Deployed, holds, peer_of, write_snippet
from clado.plugins import available
from clado.records.results import Accuracy
from clado.records.text import file_name, percent, write_text
from clado.run.opened_run import OpenedRun
from clado.space import Assignment

FORMATS = ("safetensors", "packed", "onnx", *available("snippets"))
PACKED, ONNX = "packed.safetensors", "network.onnx"
COMPARED_IMAGES = 1000  # images of the validation set that ONNX Runtime runs on


def budget_folder(run: OpenedRun, budget: str) -> Path:
    """Where the chosen network of a budget is exported."""
    return run.folder / "exports" / file_name(budget)


def model_folder(run: OpenedRun, budget: str) -> Path:
    """Where the model of a budget's chosen network is kept for MLflow."""
    return run.folder / "models" / file_name(budget)


def check_format(kind: str) -> None:
    """Raises ConfigurationError for an unknown format."""
    if kind not in FORMATS:
        raise ConfigurationError(f"unknown format {kind!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def export_as(kind: str, run: OpenedRun, assignment: Assignment, folder: Path) -> tuple[Path, str]:
    """Exports an assignment in a format. Returns the path that was written, and a message about it."""
    if kind == "safetensors":
        return export(run, assignment, folder), ""
    if kind in available("snippets"):
        deployed = run.preparation.deployed(assignment)
        remark = kept_with(kind, run, assignment, deployed)
        return write_snippet(folder, kind, run.space, assignment, remark, deployed), remark
    network, layers = run.preparation.deployed(assignment)
    document = run.space.to_json(assignment)
    if (folder / ASSIGNMENT).is_file() and not holds(folder / ASSIGNMENT, document):
        raise StoreError(f"{folder} holds the export of another assignment; name another folder, or remove that one")
    if kind == "packed":
        from clado.exporting.packed import export_packed

        file = folder / PACKED
        size = export_packed(file, network, layers)
        write_text(folder / ASSIGNMENT, json.dumps(document, indent=1))
        told = (
            f"{size.total_bytes:,} bytes of tensors, {size.weight_bytes:,} of them weights, and a header of {size.header_bytes:,}"
        )
        return file, f"{told}; load it with clado.load_packed({str(file)!r}, network)"
    from clado.exporting._onnx_agreement import compare
    from clado.exporting.onnx import export_onnx

    file = folder / ONNX
    written = export_onnx(file, network, layers)
    write_text(folder / ASSIGNMENT, json.dumps(document, indent=1))
    widened = sorted({f"{bits} bits as {dtype}" for _, bits, dtype in written.widened})
    remark = f"; {len(written.widened)} layers are stored wider, as ONNX can: {', '.join(widened)}" if widened else ""
    told = f"{written.file_bytes:,} bytes, {written.weight_bytes:,} of them weights{remark}"
    validation = run.slices.validation
    agreement = compare(file, network, layers, *validation.load(0, min(COMPARED_IMAGES, len(validation))))
    return file, f"{told}\n{agreement}"


def export(run: OpenedRun, assignment: Assignment, folder: Path) -> Path:
    """The network with an assignment's weights: weights.safetensors, assignment.json, README.md with a loading snippet."""
    network, layers = run.preparation.deployed(assignment)
    state, document = network.state_dict(layers), run.space.to_json(assignment)
    added = [name for name in state if name not in network.model.state_dict()]
    if added:  # refused if a module takes no bias, or if its forward would not read it
        as_module(network, {i: replace(layer, activation=None) for i, layer in as_layers(layers).items()})
    replaced = (folder / ASSIGNMENT).is_file() and not holds(folder / ASSIGNMENT, document)
    export_network(folder, state, document, loading_snippet(run, bool(added)), facts(run, assignment))
    if replaced:  # what lies beside is of another assignment
        of_peers = [name for peer in available("snippets") for name in (f"assignment_{peer}.py", f"weights_{peer}.safetensors")]
        for name in (PACKED, ONNX, *of_peers):
            (folder / name).unlink(missing_ok=True)
    return folder


def kept_with(name: str, run: OpenedRun, assignment: Assignment, deployed: Deployed) -> str:
    """What a peer's file keeps of what was measured: accuracy as measured, and as the peer computes, which is emulated."""
    peer = peer_of(name)
    counts = run.evaluation.validation_counts([assignment], lambda items: map(run.evaluation.count_batch, items))
    measured = f"As measured here: {_accuracy_text(counts[assignment].accuracy())}."
    rounds_inputs = any(layer.activation is not None for layer in deployed[1].values())
    if peer.carries(deployed) and not rounds_inputs:
        return f"The weights travel with corrections and scales: {peer.title} computes what was measured.\n{measured}"
    lost = []
    if not peer.carries(deployed):
        lost.append(f"only bit-widths travel: {peer.title} rounds to nearest with scales of its own, without clado's corrections")
    if rounds_inputs:
        lost.append(f"{peer.title} has other grids for inputs, or leaves them in float")
    evaluation = run.evaluation
    emulated = sum(
        (
            count_each(
                [peer.computed(run.float_network, deployed)],
                run.slices.validation,
                start,
                stop,
                evaluation.batch_images,
                run.float_network,
                run.judge,
            )[0]
            for start, stop in evaluation.batches
        ),
        Counts(),
    )
    return f"WARNING: {'; '.join(lost)}.\n{measured}\nAs {peer.title} rounds, emulated: {_accuracy_text(emulated.accuracy())}."


def _accuracy_text(accuracy: Accuracy) -> str:
    if accuracy.top1 is None or accuracy.top1_interval is None:
        return f"KL from the float network {accuracy.loss:.4g} on {accuracy.num_images:,} images"
    low, high = accuracy.top1_interval
    return f"top-1 {percent(accuracy.top1)} % (95 %: {percent(low)} to {percent(high)}) on {accuracy.num_images:,} images"


def facts(run: OpenedRun, assignment: Assignment) -> list[str]:
    """What a reader of the exported folder must know: inputs, outputs, and accuracy if it was measured."""
    shape, validation = ", ".join(map(str, run.loaded.image_shape)), run.slices.validation
    preprocessing = "pixels / 255" if not isinstance(validation, EncodedSlice) else str(validation.preprocessing)
    if run.config.data.source == "zoo":
        preprocessing = f"{preprocessing}, minus {zoo.MEAN}, divided by {zoo.STD}"
    known = run.evaluation.cache("validation").get(run.evaluation.representative(assignment))
    classes = validation.num_classes
    return [
        f"Input: float32 (images, {shape}): {preprocessing}",
        "Output: logits" + (f" of {classes:,} classes" if classes else ""),
        *([] if known is None else [f"Measured: {_accuracy_text(known.accuracy())}"]),
    ]


ADDING = """for name in state.keys() - network.state_dict().keys():  # biases that corrections gave to layers without one
    module, _, attribute = name.rpartition(".")
    network.get_submodule(module).register_parameter(attribute, torch.nn.Parameter(state[name]))"""


def loading_snippet(run: OpenedRun, adds_biases: bool = False) -> str:
    """The Python code that builds the network and loads the exported weights."""
    network = run.config.network
    name, (module, _, function) = repr(network.name), network.name.partition(":")
    build = {
        "zoo": f"from clado.data.zoo import NETWORKS; network = NETWORKS[{name}]()",
        "torchvision": f"from torchvision.models import get_model; network = get_model({name}, weights=None{_built(run)})",
        "timm": f"import timm; network = timm.create_model({name}, pretrained=False{_timm_options(run)})",
        "factory": f"from {module} import {function} as factory; made = factory()\n"
        "network = made[0] if isinstance(made, tuple) else made  # a factory may give an example input as well",
    }[network.source]
    return "\n".join(
        (
            *(["import torch"] if adds_biases else []),
            "from safetensors.torch import load_file",
            build,
            'state = load_file("weights.safetensors")',
            *([ADDING] if adds_biases else []),
            "network.load_state_dict(state)",
        )
    )


def _built(run: OpenedRun) -> str:
    """The arguments with which sources/torchvision.py built the network, as text.

    They are the image size of a vision transformer if it is not 224 pixels, and the normalisation that published weights
    need.
    """
    if run.config.network.source != "torchvision":
        return ""
    size = run.loaded.image_shape[1]
    if getattr(run.loaded.model, "transform_input", False):
        return ", transform_input=True"
    return f", image_size={size}" if run.config.network.name.startswith("vit_") and size != 224 else ""


def _timm_options(run: OpenedRun) -> str:
    """The options that sources/timm.py built the network with, as additional arguments."""
    if run.config.network.source != "timm" or run.config.network.image_shape is None:
        return ""
    import timm

    channels, *size = run.config.network.image_shape
    pretrained = timm.get_pretrained_cfg(run.config.network.name)
    fixed = pretrained is not None and pretrained.fixed_input_size
    return f", in_chans={channels}" + (f", img_size={tuple(size)}" if fixed else "")
