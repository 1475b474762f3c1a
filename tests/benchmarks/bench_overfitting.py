"""What rounding fits to calibration images is worth on others; writes OVERFITTING.md. Run: make bench-overfitting PHOTOS=FOLDER.

A classifier sees one row of each image. Of 256 rows the covariance of 1,280 columns is mostly noise, and rounding that is fitted
to it fits the noise. The page compares codes that are fitted to the covariance as measured with those of `Moments.shrunk`.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from clado.criteria.kl_to_float import kl_to_float
from clado.network.network import Network
from clado.quantization.moments import Moments
from clado.quantization.preparation import Prepared, Recipe, prepare
from clado.records.text import markdown_table
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.bench_preparing import network_of, photographs

HERE = Path(__file__).parent
CALIBRATION, JUDGED = 256, 400  # photographs
BITS = (2, 3, 4)
WHOLE = (3, 4)  # of the whole network, which works at no fewer
CORRECTIONS = ("gptq", "output_statistics")


def ways(network: Network, images: Tensor) -> dict[str, Prepared]:
    """The network at every width, rounded in each way; all with matched output statistics."""
    space = network.search_space(BITS)
    both = Recipe(corrections=CORRECTIONS)
    shrunk = prepare(network, space, both, [images])
    with patch.object(Moments, "shrunk", lambda self: self):
        measured = prepare(network, space, both, [images])
    nearest = prepare(network, space, Recipe(corrections=CORRECTIONS[1:]), [images])
    return {"nearest codes": nearest, "fitted as measured": measured, "fitted, shrunk": shrunk}


def divergences(network: Network, layers: dict, images: Tensor) -> Tensor:
    """KL divergence from the float network of each image."""
    found = []
    for batch in images.split(network.images_at_once):
        found.append(kl_to_float(network.logits(batch, layers), network.logits(batch)).double())
    return torch.cat(found)


def table(network: Network, images: Tensor) -> str:
    """KL on the calibration photographs and on others, of the classifier alone and of every layer."""
    seen, unseen = images[:CALIBRATION], images[CALIBRATION:]
    rows = []
    prepared = ways(network, seen)
    last = len(network.layers) - 1
    for part, widths in (("classifier", BITS), ("every layer", WHOLE)):
        for bits in widths:
            for name, ready in prepared.items():
                uniform = next(a for b, a in ready.space.uniform_assignments() if b == bits)
                layers = ready.chosen(uniform)
                layers = {last: layers[last]} if part == "classifier" else layers
                on_seen, on_unseen = (divergences(ready.network, layers, x) for x in (seen, unseen))
                error = float(on_unseen.std(correction=1)) / len(on_unseen) ** 0.5
                rows.append([part, str(bits), name, f"{on_seen.mean():.4f}", f"{on_unseen.mean():.4f} ± {error:.4f}"])
                print(rows[-1], flush=True)
    return markdown_table(["quantized", "bits", "codes", f"KL on the {len(seen)}", f"KL on {len(unseen)} others"], rows)


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of ImageNet photographs")
    photos = parser.parse_args().photos
    network, images = network_of("efficientnet_lite0"), photographs(photos, CALIBRATION + JUDGED)
    with torch.inference_mode():
        body = table(network, images)
    page = (
        "# Overfitting to calibration images\n\nWritten by `make bench-overfitting PHOTOS=FOLDER`. EfficientNet-Lite0, 224 "
        f"pixels, {CALIBRATION} calibration photographs. Output statistics are matched in every row. KL divergence from the "
        f"float network, with its standard error.\n\nMachine: {machine()}.\n\n{body}\n"
    )
    (HERE / "OVERFITTING.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
