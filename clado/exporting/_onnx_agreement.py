"""Compares an exported ONNX file with torch: both run on the same images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado.errors import ConfigurationError
from clado.exporting._torch_module import as_module
from clado.network.network import Network, Replaced

NEAR = 1e-3  # logits that differ by less may swap their order
BATCH_IMAGES = 128


@dataclass(frozen=True)
class Agreement:
    """ONNX Runtime compared with torch on the same images.

    If inputs are quantized, a difference in the last digit sometimes moves a code by one. Logits
    then differ by more than rounding. Torch in float64 differs from torch in float32 as much.
    """

    num_images: int
    """Images that both ran on."""
    max_difference: float
    """Largest difference of any logit, without graph optimisation."""
    disagreements: int
    """Images whose first class differs, without graph optimisation.

    An image is not counted if torch's two largest logits differ by at most 1e-3.
    """
    top1_optimised: float
    """Share of images whose first class is the label, with ONNX Runtime's usual optimisation.

    Without labels, torch's first class takes the label's place. If inputs are quantized, the
    optimisation also rounds biases, unless its `WeightBiasQuantization` is switched off.
    """
    top1_torch: float | None
    """Share of images whose first class is the label, in torch; None without labels."""

    def __str__(self) -> str:
        reference_text = "as in torch" if self.top1_torch is None else f"right, {100 * self.top1_torch:.2f} % in torch"
        return (
            f"ONNX Runtime on {self.num_images:,} images: logits within {self.max_difference:.2g} of torch without graph "
            f"optimisation, another first class on {self.disagreements}; with its usual optimisation first classes are "
            f"{100 * self.top1_optimised:.2f} % {reference_text}"
        )


def compare(path: Path, network: Network, layers: Replaced, images: Tensor, labels: Tensor | None = None) -> Agreement:
    """Runs an exported file in ONNX Runtime on images (N, C, H, W), and torch on the same.

    Raises:
        ConfigurationError: ONNX Runtime is not installed.
    """
    runtime = library("onnxruntime")
    levels = runtime.GraphOptimizationLevel
    run_exact, run_optimised = (_session(runtime, path, level) for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL))
    model = as_module(network, layers).cpu()
    max_difference, disagreements, hits_torch, hits_optimised = 0.0, 0, 0, 0
    for batch, batch_labels in zip(torch.split(images, BATCH_IMAGES), _split(labels, len(images)), strict=True):
        with torch.inference_mode():
            expected = model(batch)
        exact, optimised = (torch.from_numpy(run(batch)) for run in (run_exact, run_optimised))
        top2 = expected.topk(2).values
        is_clear = top2[:, 0] - top2[:, 1] > NEAR
        classes = expected.argmax(1)
        truth = classes if batch_labels is None else batch_labels
        max_difference = max(max_difference, float((exact - expected).abs().max()))
        disagreements += int((is_clear & (exact.argmax(1) != classes)).sum())
        hits_torch += int((classes == truth).sum())
        hits_optimised += int((optimised.argmax(1) == truth).sum())
    top1_torch = None if labels is None else hits_torch / len(images)
    return Agreement(len(images), max_difference, disagreements, hits_optimised / len(images), top1_torch)


def _split(labels: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * -(-count // BATCH_IMAGES) if labels is None else torch.split(labels, BATCH_IMAGES)


def _session(runtime: ModuleType, path: Path, level: Any) -> Callable[[Tensor], NDArray[np.float32]]:
    options = runtime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images.contiguous().numpy()})[0]
        return logits

    return run


def library(name: str) -> ModuleType:
    """A module of the extra `onnx`. Raises ConfigurationError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"ONNX needs packages that are not installed ({error.name}); install them with: pip install 'clado[onnx]'"
        ) from error
