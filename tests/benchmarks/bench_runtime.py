"""Networks in ONNX Runtime: predicted and measured time, accuracy, kernels, bytes. Writes RUNTIME.md. Run: make bench-runtime.

    python -m tests.benchmarks.bench_runtime resnet18                            # times with random weights
    python -m tests.benchmarks.bench_runtime efficientnet_lite0 --photos FOLDER  # accuracy on ImageNet photographs, too
    python -m tests.benchmarks.bench_runtime                                     # writes the page from the cells alone

Other networks are mobilenet_v2 and vit_b_16. A cell is a small JSON file in `runtime/`. A cell that is there is not measured
again. The machine should do nothing else. `--trial` measures a cell with few images and turns, and keeps nothing in `runtime/`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from clado.bits import FLOAT
from clado.exporting.runtimes import Logits, median_seconds
from clado.exporting.runtimes.onnxruntime import runtime
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.records.interval import Interval
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.records.text import file_name, markdown_table
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.space import Assignment, SearchSpace
from flows.commands.profile import Turns, networks_of, predicted_seconds, table_of, time_turns
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
ROOT, CELLS, PAGE = HERE.parents[1], HERE / "runtime", HERE / "RUNTIME.md"
CACHE = ROOT / ".cache" / "bench-runtime"
RECIPE = ROOT / "recipes" / "imagenet" / "efficientnet_lite0.yaml"
EFFICIENTNET = "efficientnet_lite0"
NETWORKS = ("resnet18", "mobilenet_v2", EFFICIENTNET, "vit_b_16")
STATIC, ENDS, FASTEST = "quantize_static", "8/8, first and last layer in float", "fastest by the table, 8/8 or float"
METHODS = ("MinMax", "Entropy", "Percentile")
CALIBRATION, BATCH, STRIDE, FIRST_TURNS = 4, 16, 8, 3
SHARES = (0.0, 0.05, 0.2)
"""Budgets of latency between the least time of the table and that of float."""


# -- times with noise ------------------------------------------------------------------------------------------------------


def load(name: str) -> nn.Module:
    """The module, in eval mode."""
    if name == EFFICIENTNET:
        from clado.data.factories import efficientnet_lite0

        return efficientnet_lite0()[0].eval()
    from torchvision.models import get_model

    return get_model(name, weights=None).eval()


def times_cell(name: str, folder: Path, turns: int) -> dict[str, Any]:
    """Uniform, mixed and chosen networks on noise of 224 pixels: time, prediction, kernels and bytes."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 224, 224)
    is_transformer = name.startswith("vit")
    network = Network(load(name), x[:1], split=["*.in_proj_weight"] if is_transformer else [])
    space = network.search_space((4,) if is_transformer else (4, 8, "float")).with_activations([] if is_transformer else [8])
    prepared = prepare(network, space, Recipe(WeightQuantizer("minmax"), "minmax"), [x[:CALIBRATION]])
    folder.mkdir(parents=True, exist_ok=True)

    def write(networks: Mapping[str, Assignment]) -> None:
        for title, assignment in networks.items():
            if not file_of(folder, title).exists():
                runtime.write(file_of(folder, title), *prepared.deployed(assignment), x[:CALIBRATION])

    def profiled(titles: Collection[str], turns: int) -> Turns:
        timed = Turns("benchmark", {"threads": 1})
        time_turns(timed, runtime, {title: file_of(folder, title) for title in titles}, x[:1].numpy(), space.names, turns)
        table.write_text(table_of(space, timed, 1))
        return timed

    networks, table = networks_of(space), folder / "times.csv"
    write(networks)
    if not is_transformer:
        profiled(networks, FIRST_TURNS)
        networks |= mixed(space) | {ENDS: ends_in_float(space), FASTEST: fastest(table, space)}
        file_of(folder, FASTEST).unlink(missing_ok=True)  # times may differ from those of an earlier call
        write(networks)
        if not file_of(folder, STATIC).exists():
            quantize_static(file_of(folder, FLOAT), file_of(folder, STATIC), x[:CALIBRATION].numpy(), "MinMax")
    titles = [*networks, *([] if is_transformer else [STATIC])]
    timed = profiled(titles, turns)  # the table and the networks in the same turns, so that a busy moment affects both
    sessions = {title: runtime.open(file_of(folder, title), 1) for title in titles}
    expected = sessions[FLOAT](x.numpy())
    rows = []
    for title in titles:
        logits = sessions[title](x.numpy())
        row = {"network": title, "milliseconds": 1000 * timed.seconds(title), "bytes": file_of(folder, title).stat().st_size}
        row |= {"predicted": None, "logits_from_float": float(np.abs(logits - expected).mean())}
        if title in networks:
            row |= facts_of(space, networks[title], table, file_of(folder, title))
        rows.append(row)
    linear = sum(layer.operator == "linear" for layer in space.layers)
    return {"machine": machine(), "versions": dict(runtime.versions()), "turns": turns, "linear": linear, "rows": rows}


def facts_of(space: SearchSpace, assignment: Assignment, table: Path, file: Path) -> dict[str, Any]:
    """Predicted milliseconds, kernels, and bytes of codes and scales as a share of their claim."""
    claimed = sum(
        layer.weight_bytes(bits) + 4 * layer.num_channels
        for layer, bits in zip(space.layers, assignment.bits, strict=True)
        if bits is not None
    )
    is_listed = len(space.chosen_options(assignment)) == space.num_layers
    return {
        "predicted": 1000 * predicted_seconds(table, space, assignment) if is_listed else None,
        "kernels": dict(runtime.kernels(file)),
        "share_of_claim": sum(runtime.code_bytes(file).values()) / claimed if claimed else None,
        "float_layers": assignment.bits.count(None),
    }


def mixed(space: SearchSpace) -> dict[str, Assignment]:
    """Three networks of random options: of the quantized options, of 8 bits and float, and of all options."""
    generator = np.random.default_rng(0)
    offers = {
        "random, 4/8 or 8/8": lambda bits: bits is not None,
        "random, 8/8 or float": lambda bits: bits != 4,
        "random, all three": lambda bits: True,
    }
    return {
        title: space.assignment([int(generator.choice(options_of(space, i, offered))) for i in range(space.num_layers)])
        for title, offered in offers.items()
    }


def options_of(space: SearchSpace, layer: int, is_offered: Any = lambda bits: bits != 4) -> list[int]:
    """The options of a layer whose bits are offered: 8 bits and float, if nothing else is said."""
    return [k for k in space.options_of(layer) if is_offered(space.options[k].bits)]


def ends_in_float(space: SearchSpace) -> Assignment:
    """Eight bits in all layers but the first and the last, as people do by hand."""
    wanted = [None if i in (0, space.num_layers - 1) else 8 for i in range(space.num_layers)]
    return space.assignment([options_of(space, i, lambda bits, b=b: bits == b)[0] for i, b in enumerate(wanted)])


def fastest(table: Path, space: SearchSpace) -> Assignment:
    """The fastest option of each layer, of 8 bits and float."""
    start = [options_of(space, i)[0] for i in range(space.num_layers)]

    def seconds(layer: int, option: int) -> float:
        return predicted_seconds(table, space, space.assignment([*start[:layer], option, *start[layer + 1 :]]))

    return space.assignment([min(options_of(space, i), key=lambda k: seconds(i, k)) for i in range(space.num_layers)])


# -- ONNX Runtime's own quantization ---------------------------------------------------------------------------------------


def quantize_static(path: Path, target: Path, images: NDArray[np.float32], method: str) -> None:
    """ONNX Runtime's own quantization, per channel.

    Args:
        path: The file of the float network.
        target: The file to write.
        images: Calibration images (n, C, H, W); n is a multiple of `STRIDE`, or less.
        method: A name of its calibration methods.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):
        """Some images at a time, because every result of every layer is kept until then."""

        def __init__(self) -> None:
            self.set_range(0, len(images))

        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.images: Iterator[NDArray[np.float32]] = iter(images[start_index:end_index])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    simplified, temporary = target.with_suffix(".pre"), target.with_suffix(".part")
    shape_inference.quant_pre_process(str(path), str(simplified))
    quantization.quantize_static(
        str(simplified),
        str(temporary),
        Reader(),
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, method),
        extra_options={"CalibStridedMinMax": min(STRIDE, len(images))},
    )
    temporary.replace(target)


# -- accuracy on photographs -----------------------------------------------------------------------------------------------


def accuracy_cell(photos: Path, folder: Path, turns: int, is_trial: bool) -> dict[str, Any]:
    """EfficientNet-Lite0 with 8 bits or float, chosen by clado, and ONNX Runtime's own quantization, on the same photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    document = settings(photos, folder, is_trial)
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump({**document, "budgets": {"average_bits": [8]}}))
    clado("profile", str(file), "--turns", str(turns))
    table, space = folder / "run" / "profile" / "onnxruntime.csv", open_run(parse_config(document)).space
    slow = predicted_seconds(table, space, space.widest)  # all layers in float
    fast = predicted_seconds(table, space, fastest(table, space))
    budgets = [round(fast + share * (slow - fast) + 1e-6, 6) for share in SHARES]  # not less than the least, which is rounded
    document = json.loads(run_document.read_text()) if (run_document := folder / "run.json").is_file() else {
        **document, "budgets": {"latency": budgets},
    }  # fmt: skip
    run_document.write_text(json.dumps(document))  # the same budgets when a stopped run goes on
    file.write_text(yaml.safe_dump(document))
    clado("run", str(file))
    return measured_on(open_run(parse_config(document)), table, folder / "files", turns)


def settings(photos: Path, folder: Path, is_trial: bool) -> dict[str, Any]:
    """The recipe with 8 bits or float, inputs of 8 bits, and native options."""
    document: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    document |= {
        "bits": [8, "float"],
        "activations": {"bits": [8]},
        "runtime": {"name": "onnxruntime", "candidates": "native"},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}", "models": False},
        "folder": str(folder / "run"),
    }
    document["data"]["path"] = str(photos)
    if is_trial:
        document["data"] |= {"calibration_images": 32, "sensitivity_images": 16, "validation_images": 24}
        document |= {"estimators": ["layerwise"], "corrections": ["output_statistics"]}
    return document


def clado(*arguments: str) -> None:
    """Runs a command. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"clado {' '.join(arguments)} failed: {done.stdout[-2000:]}")


def measured_on(run: OpenedRun, table: Path, folder: Path, turns: int) -> dict[str, Any]:
    """Accuracy as ONNX Runtime computes it on all validation images, and milliseconds in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord.load(run.folder / "record.json")
    chosen = {f"clado, {row.budget}": row.assignment for row in record.results if row.method == CHOSEN}
    uniform = {f"clado, {bits} bits": candidate for bits, candidate in run.space.uniform_assignments() if bits <= 8}
    images = torch.cat(run.preparation.calibration)
    files = {FLOAT: folder / "float.onnx"}
    runtime.write(files[FLOAT], run.float_network, {}, images)
    for title, assignment in {**chosen, **uniform}.items():
        files[title] = folder / f"{file_name(title)}.onnx"
        runtime.write(files[title], *run.preparation.deployed(assignment), images)
    for method in METHODS:
        files[title] = folder / f"{file_name(title := f'{STATIC}, {method}')}.onnx"
        if not files[title].exists():
            print(f"{title}: {len(images)} images", flush=True)
            quantize_static(files[FLOAT], files[title], images.float().cpu().contiguous().numpy(), method)
    sessions = {title: runtime.open(file, 1) for title, file in files.items()}
    hits = hits_of(run, sessions)
    image = run.slices.validation.load(0, 1)[0].float().contiguous().numpy()
    seconds = timed_in_turns(sessions, image, 3 * turns)
    best = max((f"{STATIC}, {method}" for method in METHODS), key=lambda title: int(hits[title].sum()))
    assignments = {**chosen, **uniform}
    rows = []
    for title, file in files.items():
        gain = Interval.of_hits(hits[title], hits[best])  # hits that the best `quantize_static` loses
        predicted = 1000 * predicted_seconds(table, run.space, assignments[title]) if title in assignments else None
        rows.append(
            {
                "network": title, "top1": float(hits[title].mean()), "gain": [gain.mean, gain.low, gain.high],
                "milliseconds": 1000 * seconds[title], "predicted": predicted, "bytes": file.stat().st_size,
                "float_layers": assignments[title].bits.count(None) if title in assignments else None,
            }
        )  # fmt: skip
    data = {name: part["num_images"] for name, part in record.data.items()}
    facts = {"machine": machine(), "versions": dict(runtime.versions()), "turns": 3 * turns, "images": data}
    return {**facts, "best": best, "rows": rows}


def hits_of(run: OpenedRun, sessions: Mapping[str, Logits]) -> dict[str, NDArray[np.bool_]]:
    """Which validation images each network has right."""
    parts: dict[str, list[NDArray[np.bool_]]] = {title: [] for title in sessions}
    validation = run.slices.validation
    for start in range(0, len(validation), BATCH):
        x, labels = validation.load(start, min(start + BATCH, len(validation)))
        assert isinstance(labels, Tensor)
        for title, session in sessions.items():
            parts[title].append(session(x.float().contiguous().numpy()).argmax(1) == labels.numpy())
    return {title: np.concatenate(part) for title, part in parts.items()}


def timed_in_turns(sessions: Mapping[str, Logits], image: NDArray[np.float32], turns: int) -> dict[str, float]:
    """Median seconds of each network on one image."""
    return median_seconds({title: (lambda session=session: session(image)) for title, session in sessions.items()}, turns)


def file_of(folder: Path, title: str) -> Path:
    """The file of a network."""
    return folder / f"{file_name(title)}.onnx"


# -- cells and page --------------------------------------------------------------------------------------------------------


def times_table(cell: Mapping[str, Any]) -> str:
    """One row for each network."""
    base = cell["rows"][0]["milliseconds"]
    table = [
        [
            row["network"], str(row.get("float_layers", "–")), f"{row['milliseconds']:.2f}", f"{base / row['milliseconds']:.2f}",
            "–" if row["predicted"] is None else f"{row['predicted'] / row['milliseconds']:.2f}", f"{row['bytes']:,}",
            f"{row['share_of_claim']:.3f}" if row.get("share_of_claim") else "–",
            str(row["kernels"].get("MatMulNBits", 0)) if "kernels" in row else "–", f"{row['logits_from_float']:.3f}",
        ]
        for row in cell["rows"]
    ]  # fmt: skip
    header = ["network", "layers in float", "ms", "times as fast as float", "predicted ÷ measured", "bytes of the file"]
    return markdown_table([*header, "codes ÷ claim", "MatMulNBits", "logits from float"], table)


def accuracy_table(cell: Mapping[str, Any]) -> str:
    """One row for each network."""
    rows = {row["network"]: row for row in cell["rows"]}
    base, best = rows[FLOAT]["milliseconds"], rows[cell["best"]]["milliseconds"]
    table = [
        [
            title, "–" if row["float_layers"] is None else str(row["float_layers"]), f"{100 * row['top1']:.2f}",
            "–" if title == cell["best"] else "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * value for value in row["gain"])),
            f"{row['milliseconds']:.2f}", f"{base / row['milliseconds']:.2f}", f"{row['milliseconds'] / best:.2f}",
            "–" if row["predicted"] is None else f"{row['predicted'] / row['milliseconds']:.2f}", f"{row['bytes']:,}",
        ]
        for title, row in rows.items()
    ]  # fmt: skip
    header = ["network", "layers in float", "top-1 %", "minus the best `quantize_static`", "ms", "times as fast as float"]
    return markdown_table(
        [*header, "ms ÷ those of the best `quantize_static`", "predicted ÷ measured", "bytes of the file"], table
    )


def page(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the cells that are there."""
    parts = [
        "# Networks in ONNX Runtime\n\nWritten by `make bench-runtime PHOTOS=FOLDER` from the cells in "
        "`tests/benchmarks/runtime/`. One thread runs one image of 224 pixels. Milliseconds are medians, and networks take "
        "turns. `8/8` has weights and inputs of 8 bits. Predictions are sums of a table of layers, as `clado profile` makes it, "
        "of the same turns. So they hold by construction for networks that have the same bits everywhere. "
        "`quantize_static` is ONNX Runtime's own, per channel.\n"
    ]
    for name in NETWORKS:
        if cell := cells.get(name):
            versions = ", ".join(f"{key} {version}" for key, version in cell["versions"].items())
            parts.append(
                f"## {name}\n\nImages are noise{'' if name == EFFICIENTNET else ', and weights are random'}. "
                f"{cell['linear']} linear layers. {cell['turns']} turns. {cell['machine']}; {versions}.\n\n"
                f"{times_table(cell)}\n"
            )
        else:
            parts.append(f"## {name}\n\nNot measured yet.\n")
    title = f"## {EFFICIENTNET} on ImageNet photographs\n\n"
    if cell := cells.get(f"{EFFICIENTNET}-accuracy"):
        images = ", ".join(f"{count:,} {part.removesuffix('_set')}" for part, count in cell["images"].items())
        parts.append(
            f"{title}Photographs: {images}. Layers have 8 bits, with inputs of 8 bits, or stay in float. `quantize_static` has "
            "the same calibration photographs; of its calibration methods the most accurate one counts. Accuracy is what ONNX "
            "Runtime computes on the validation photographs. Differences are in points of top-1, with paired 95 % intervals. "
            f"{cell['turns']} turns. {cell['machine']}.\n\n{accuracy_table(cell)}\n"
        )
    else:
        parts.append(f"{title}Not measured yet.\n")
    return filled("\n".join(parts))


def kept_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """All cells that are kept, by name."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def main() -> None:
    """Measures the cells that are absent, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--photos", type=Path, help="a folder of ImageNet photographs, for the accuracy of EfficientNet-Lite0")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--trial", action="store_true", help="few images and turns; prints the page, and keeps no cell")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.networks) - set(NETWORKS)):
        parser.error(f"unknown network {unknown[0]}; expected one of {', '.join(NETWORKS)}")
    turns = 2 if arguments.trial else arguments.turns
    cache, folder = (CACHE / "trial", CACHE / "trial" / "cells") if arguments.trial else (CACHE, CELLS)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: (lambda name=name: times_cell(name, cache / name, turns)) for name in arguments.networks}
    if EFFICIENTNET in arguments.networks and arguments.photos:
        photos = arguments.photos.resolve()
        wanted[f"{EFFICIENTNET}-accuracy"] = lambda: accuracy_cell(photos, cache / "accuracy", turns, arguments.trial)
    for name, measure in wanted.items():
        file = folder / f"{name}.json"
        if file.exists():
            print(f"{name}: already measured, in {file}")
            continue
        file.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
        print(f"{name}: measured", flush=True)
    text = page(kept_cells(folder))
    if arguments.trial:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
