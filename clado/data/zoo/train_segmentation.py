"""Trains the zoo's U-Net on composites of Fashion-MNIST: `python -m clado.data.zoo.train_segmentation --data FOLDER`.

FOLDER, and who sees which image, are those of `train.py`. Each epoch draws other composites of the training images. Composites of
the selection images choose the checkpoint. Those of the test images are evaluated at the end.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.data.zoo import NETWORKS
from clado.data.zoo.composites import GARMENTS, composites, mean_iou
from clado.data.zoo.train import normalise, note, read_fashion_mnist, save, split_training_images

NAME = "unet_fashion_mnist"
BATCH = 64


def composed(images: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised composites (count, 1, 48, 48), and the class of each pixel."""
    canvases, masks = composites(images, labels, count, seed)
    return normalise(canvases), torch.from_numpy(masks)


@torch.inference_mode()
def average_iou(network: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean of `mean_iou` over images, in float32."""
    network.eval()
    parts = zip(torch.split(images, 125), torch.split(masks, 125), strict=True)
    return float(torch.cat([mean_iou(network(x), y) for x, y in parts]).mean())


def train(data: dict[str, np.ndarray], epochs: int, lr: float, seed: int) -> tuple[nn.Module, dict[str, object]]:
    """Trains with one cycle of the learning rate.

    Returns:
        The checkpoint of the best mean IoU on composites of the selection images, and facts for the manifest.
    """
    torch.manual_seed(seed)
    slices = split_training_images()
    garments = {name: (data["train_images"][slices[name]], data["train_labels"][slices[name]]) for name in slices}
    selection = composed(*garments["selection"], len(slices["selection"]) // GARMENTS)
    network = NETWORKS[NAME]().to(memory_format=torch.channels_last)
    per_epoch = len(slices["training"]) // GARMENTS // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * per_epoch, pct_start=0.2)
    best, best_state, best_epoch = 0.0, {}, -1
    for epoch in range(epochs):
        network.train()
        begin = time.perf_counter()
        images, masks = composed(*garments["training"], per_epoch * BATCH, seed=1 + epoch)
        for x, y in zip(torch.split(images, BATCH), torch.split(masks, BATCH), strict=True):
            loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        iou = average_iou(network, *selection)
        print(f"{NAME} epoch {epoch + 1}/{epochs}: mean IoU {iou:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
        if iou >= best:
            best, best_epoch = iou, epoch + 1
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
    network.load_state_dict(best_state)
    facts: dict[str, object]
    facts = {"epochs": epochs, "lr": lr, "batch": BATCH, "seed": seed, "best_epoch": best_epoch, "selection_mean_iou": best}
    return network, facts


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=6e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = read_fashion_mnist(options.data)
    network, facts = train(data, options.epochs, options.lr, options.seed)
    test = composed(data["test_images"], data["test_labels"], len(data["test_images"]) // GARMENTS)
    facts["test_mean_iou"] = average_iou(network, *test)
    facts["torch"] = torch.__version__
    save(NAME, network)
    print(NAME, facts, flush=True)
    note(NAME, facts)


if __name__ == "__main__":
    main()
