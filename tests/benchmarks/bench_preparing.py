"""What preparing costs, and how many rows of a layer's input are enough; writes PREPARING.md. Run: make bench-preparing.

Times are CPU seconds of one process with one thread. The ratio is to one float forward over the same images at the best batch.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from clado.criteria.kl_to_float import kl_to_float
from clado.network.network import Network, prefers_channels_last
from clado.quantization import sweep
from clado.quantization.preparation import Recipe, equalized, layer_inputs, observed, prepare, prepare_layer
from clado.records.text import markdown_table
from tests.benchmarks.bench_measure import by_name, machine
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
CORRECTIONS = ("equalization", "gptq", "output_statistics")
CALIBRATION, JUDGED = 256, 256  # photographs
ROWS = ((1, 256), (4, 1024), (16, 4096), (64, 16384))  # rows for each column, and the fewest
BITS = (3, 4)
CANDIDATES = (2, 4, 8)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


def network_of(name: str) -> Network:
    """A torchvision network with random weights, or EfficientNet-Lite0 with those of ImageNet."""
    if name == "efficientnet_lite0":
        from clado.data.factories import efficientnet_lite0

        model = efficientnet_lite0()[0].eval()
    else:
        model = by_name(name).eval()
    nhwc = prefers_channels_last(model, torch.device("cpu"))
    model = model.to(memory_format=torch.channels_last) if nhwc else model
    return Network(model, torch.zeros(2, 3, 224, 224), channels_last=nhwc)


def forward_seconds(network: Network, images: Tensor) -> float:
    """One forward over the images, at the batch of 2, 4, 8, 16 and 32 that is fastest on the first 32 of them."""

    def run(part: Tensor, size: int) -> float:
        return timed(lambda: [network.logits(batch) for batch in part.split(size)])[0]

    best = min((2, 4, 8, 16, 32), key=lambda size: run(images[:32], size))
    return run(images, best)


def costs(name: str, images: Tensor) -> dict[str, float]:
    """CPU seconds of one forward and of each part of preparing."""
    network = network_of(name)
    space, recipe = network.search_space(CANDIDATES), Recipe(corrections=CORRECTIONS)
    seconds = {"forward": forward_seconds(network, images)}
    batches = [*images.split(network.images_at_once)]
    seconds["equalization"], (tensors, _) = timed(lambda: equalized(network, recipe, [observed(network, recipe, batches)]))
    equal = network.updated(tensors)
    seconds["sweep"], inputs = timed(lambda: layer_inputs(equal, space, recipe, [images]))
    layers = range(space.num_layers)
    seconds["layers"], _ = timed(lambda: [prepare_layer(equal, space, recipe, i, inputs[i]) for i in layers])
    seconds["plain"], _ = timed(lambda: [prepare_layer(network, space, recipe.plain, i, None) for i in layers])
    seconds["weights"] = float(sum(weight.numel() for weight in network.weights))
    seconds["macs"] = float(network.macs * len(images))
    seconds["num_layers"] = float(space.num_layers)
    return seconds


def cost_table(images: Tensor, with_photos: bool) -> str:
    """Preparing of networks of growing size."""
    names = ["resnet18", "resnet50", *(["efficientnet_lite0"] if with_photos else [])]
    rows = []
    for name in names:
        part = images if name == "efficientnet_lite0" else images[:64]
        spent = costs(name, part)
        parts = [spent[key] for key in ("equalization", "sweep", "layers", "plain")]
        sizes = (f"{spent['num_layers']:.0f}", f"{spent['weights'] / 1e6:.1f}", f"{spent['macs'] / 1e9:.0f}")
        seconds = (f"{value:.1f}" for value in (spent["forward"], *parts))
        rows.append([name, str(len(part)), *sizes, *seconds, f"**{sum(parts) / spent['forward']:.1f}**"])
        print(rows[-1], flush=True)
    header = ["network", "images", "layers", "million weights", "GMAC of a forward", "forward"]
    return markdown_table([*header, "equalization", "sweep", "layers", "plain layers", "preparing ÷ forward"], rows)


def rows_table(photos: Tensor) -> str:
    """Loss of EfficientNet-Lite0 under uniform bits on photographs that nothing was fitted to, by the number of rows."""
    network = network_of("efficientnet_lite0")
    fitted, judged = photos[:CALIBRATION], photos[CALIBRATION:]
    floats = torch.cat([network.logits(batch) for batch in judged.split(network.images_at_once)])
    losses: dict[tuple[int, int], np.ndarray] = {}
    for (per_column, fewest), bits in itertools.product(ROWS, BITS):
        with patch.object(sweep, "ROWS_PER_COLUMN", per_column), patch.object(sweep, "FEWEST_ROWS", fewest):
            ready = prepare(network, network.search_space((bits,)), Recipe(corrections=CORRECTIONS), [fitted])
        chosen = ready.chosen(ready.space.narrowest)
        logits = torch.cat([ready.network.logits(batch, chosen) for batch in judged.split(network.images_at_once)])
        losses[per_column, bits] = kl_to_float(logits, floats).double().numpy()
        print(per_column, bits, losses[per_column, bits].mean(), flush=True)
    most = ROWS[-1][0]
    table = []
    for (per_column, fewest), bits in itertools.product(ROWS, BITS):
        loss, difference = losses[per_column, bits], losses[per_column, bits] - losses[most, bits]
        error, paired = (values.std(ddof=1) / len(values) ** 0.5 for values in (loss, difference))
        text = "-" if per_column == most else f"{difference.mean():+.4f} ± {paired:.4f}"
        table.append([f"{per_column}, {fewest:,}", str(bits), f"{loss.mean():.4f} ± {error:.4f}", text])
    return markdown_table(["rows a column, fewest", "bits", "KL to float", f"minus that of {most} rows a column"], table)


def photographs(folder: Path, count: int) -> Tensor:
    """Photographs as EfficientNet-Lite0 reads them, (count, 3, 224, 224)."""
    from clado.data.sources import load_data
    from clado.settings.schema import DataSettings
    from tests.imagenet.efficientnet import MEAN, SHAPE, STD

    settings = DataSettings(
        source="folder", path=folder, mean=MEAN, std=STD, resize=256, interpolation="bicubic",
        calibration_images=count, sensitivity_images=16, validation_images=16,
    )  # fmt: skip
    return load_data(settings, SHAPE).calibration.load(0, count)[0]


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of ImageNet photographs, for EfficientNet-Lite0")
    photos = parser.parse_args().photos
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(64, 3, 224, 224) if photos is None else photographs(photos, CALIBRATION + JUDGED)
    parts = [
        "# Preparing\n\nWritten by `make bench-preparing PHOTOS=FOLDER`. CPU seconds of one thread; corrections "
        f"{', '.join(CORRECTIONS)}; candidates {list(CANDIDATES)}; 224 pixels.\n\nMachine: {machine()}.\n\n## Cost\n",
        cost_table(images[:CALIBRATION], photos is not None),
    ]
    if photos is not None:
        parts += [
            f"\n## How many rows are enough\n\nEfficientNet-Lite0, uniform bits, {CALIBRATION} calibration photographs, loss on "
            f"{JUDGED} others with standard errors; those of differences are paired.\n",
            rows_table(images),
        ]
    (HERE / "PREPARING.md").write_text(filled("\n".join(parts) + "\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
