"""What rounding fits to calibration images is worth on others; writes OVERFITTING.md. Run: make bench-overfitting PHOTOS=FOLDER.

A classifier sees one row of each image. Of 256 rows the covariance of 1,280 columns is mostly noise, and rounding that is fitted
to it fits the noise. The page compares codes that are fitted to the covariance as measured with those of `Moments.shrunk`.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from clado.criteria.kl_to_float import kl_to_float
from clado.network.engine import Call
from clado.network.network import Network
from clado.quantization.moments import Moments
from clado.quantization.preparation import Recipe, prepare_layer
from clado.quantization.sweep import Sweep, calibration_blocks, joined
from clado.records.text import markdown_table
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.bench_preparing import network_of, photographs
from tests.benchmarks.pages import filled

HERE = Path(__file__).parent
CALIBRATION, JUDGED = 256, 400  # photographs
BITS = (2, 3, 4, 8)


def features(network: Network, images: Tensor) -> Tensor:
    """What the classifier reads, (images, columns)."""
    rows: list[Tensor] = []

    def see(layer: int, call: Call) -> None:
        rows.append(call.input.float())

    for batch in images.split(network.images_at_once):
        network.observe(batch, [len(network.layers) - 1], see)
    return torch.cat(rows)


def table(network: Network, images: Tensor) -> str:
    """KL on the calibration photographs and on others of the network with a quantized classifier."""
    last = len(network.layers) - 1
    space = network.search_space(BITS)
    x, (weight, bias) = features(network, images), (network.weights[last], network.biases[last])
    floats = F.linear(x, weight, bias)
    both = Recipe(corrections=("gptq", "output_statistics"))
    blocks = calibration_blocks(CALIBRATION)
    sweep = Sweep(CALIBRATION, moments=True)
    sample = joined([sweep.gather(network, images[start:stop], start, [last])[last] for start, stop in blocks])
    nearest = prepare_layer(network, space, Recipe(corrections=("output_statistics",)), last, sample)[0]
    shrunk = prepare_layer(network, space, both, last, sample)[0]
    with patch.object(Moments, "shrunk", lambda self: self):
        measured = prepare_layer(network, space, both, last, sample)[0]
    rows = []
    for k, bits in enumerate(BITS):
        for name, layers in (("nearest", nearest), ("fitted as measured", measured), ("fitted, shrunk", shrunk)):
            kl = kl_to_float(F.linear(x, layers[k].weight, layers[k].bias), floats).double()
            on_seen, on_unseen = kl[:CALIBRATION], kl[CALIBRATION:]
            error = float(on_unseen.std(correction=1)) / len(on_unseen) ** 0.5
            rows.append([str(bits), name, f"{on_seen.mean():.4f}", f"{on_unseen.mean():.4f} ± {error:.4f}"])
    noise = float(sample.moments.noise) if sample.moments is not None and sample.moments.noise is not None else 0.0
    body = markdown_table(["bits", "codes", f"KL on the {CALIBRATION}", f"KL on {JUDGED} others"], rows)
    return f"{100 * noise:.0f} % of the squared covariances of its {x.shape[1]:,} columns are noise.\n\n{body}"


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of ImageNet photographs")
    photos = parser.parse_args().photos
    network, images = network_of("efficientnet_lite0"), photographs(photos, CALIBRATION + JUDGED)
    with torch.inference_mode():
        body = table(network, images)
    page = (
        "# Overfitting to calibration images\n\nWritten by `make bench-overfitting PHOTOS=FOLDER`. EfficientNet-Lite0's "
        f"classifier alone is quantized, on {CALIBRATION}\ncalibration photographs. Output statistics are matched in every row. "
        f"KL divergence from the float network, with its standard\nerror. Machine: {machine()}.\n\n{body}\n"
    )
    (HERE / "OVERFITTING.md").write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
