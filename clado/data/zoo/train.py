"""Trains the zoo's networks and packs the zoo's files again: `python -m clado.data.zoo.train --data FOLDER`.

FOLDER holds Fashion-MNIST's four idx files, as Debian's package `dataset-fashion-mnist` installs them
(/usr/share/datasets/fashion-mnist) or torchvision downloads them (`--download`).

The 60,000 training images are split: 1,024 are the calibration set, 1,024 the sensitivity set, 3,000 choose the checkpoint, and
the rest train. The 10,000 test images are evaluated once, after the checkpoint is chosen.
"""

import argparse
import gzip
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clado.data.zoo import MEAN, NETWORKS, STD, ZOO

SPLIT_SEED = 20231
NUM_CALIBRATION = NUM_SENSITIVITY = 1024
NUM_SELECTION = 3000
RECIPES = {  # epochs, largest learning rate
    "resnet20_fashion_mnist": (26, 0.2),
    "mobilenetv2_fashion_mnist": (20, 0.15),
    "vit_fashion_mnist": (26, 2e-3),
}
IN_BFLOAT16 = {"resnet20_fashion_mnist"}  # autocast: half the time for wide convolutions, twice the time for small products


def read_idx(path: Path) -> np.ndarray:
    """One idx file (gzip): unsigned bytes with the shape that its header states."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    """The four arrays: train_images (60000, 28, 28), train_labels (60000,), test_images, test_labels; all uint8."""
    return {
        f"{split}_{content}s": read_idx(folder / f"{file}-{content}s-idx{rank}-ubyte.gz")
        for split, file in (("train", "train"), ("test", "t10k"))
        for content, rank in (("image", 3), ("label", 1))
    }


def split_training_images() -> dict[str, np.ndarray]:
    """Indices into the 60,000 training images of the four disjoint slices, each ascending."""
    order = np.random.default_rng(SPLIT_SEED).permutation(60_000)
    ends = np.cumsum([NUM_CALIBRATION, NUM_SENSITIVITY, NUM_SELECTION])
    names = ("calibration", "sensitivity", "selection", "training")
    return {name: np.sort(part) for name, part in zip(names, np.split(order, ends), strict=True)}


def normalise(images: np.ndarray) -> Tensor:
    """uint8 (N, 28, 28) -> float32 (N, 1, 28, 28) of mean 0 and variance 1 over the training images."""
    return ((torch.from_numpy(images.astype(np.float32)) / 255 - MEAN) / STD).unsqueeze(1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop of the images padded by two pixels, and random horizontal flip, drawn per image."""
    n = len(images)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    rows = torch.arange(28) + torch.randint(0, 5, (n, 1), generator=generator)
    columns = torch.arange(28) + torch.randint(0, 5, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.inference_mode()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose largest logit is the label's, in float32."""
    network.eval()
    correct = [(network(x).argmax(1) == y).sum() for x, y in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)]
    return float(sum(correct)) / len(labels)


def optimiser_for(name: str, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum for convolutions, AdamW for the transformer; only matrices and kernels decay."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    if name.startswith("vit"):
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr)
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}], lr=lr, momentum=0.9, nesterov=True
    )


def train(
    name: str, data: dict[str, np.ndarray], epochs: int, lr: float, batch: int, seed: int
) -> tuple[nn.Module, dict[str, object]]:
    """Trains with one cycle of the learning rate, with cosine decay.

    Returns:
        The checkpoint with the best top-1 on the selection slice, and facts for the manifest.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    slices = split_training_images()
    images = {k: normalise(data["train_images"][v]) for k, v in slices.items() if k in ("training", "selection")}
    labels = {k: torch.from_numpy(data["train_labels"][slices[k]].astype(np.int64)) for k in images}
    network = NETWORKS[name]().to(memory_format=torch.channels_last)
    optimiser = optimiser_for(name, network, lr)
    num_steps = epochs * (len(images["training"]) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=num_steps, pct_start=0.15, cycle_momentum=False)
    best_top1, best_state, best_epoch = 0.0, {}, -1
    for epoch in range(epochs):
        network.train()
        begin = time.perf_counter()
        order = torch.randperm(len(images["training"]), generator=generator)
        for indices in torch.split(order, batch)[: len(order) // batch]:
            x = augment(images["training"][indices], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=name in IN_BFLOAT16):
                loss = F.cross_entropy(network(x), labels["training"][indices])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        accuracy = top1(network, images["selection"], labels["selection"])
        print(
            f"{name} epoch {epoch + 1}/{epochs}: selection top-1 {accuracy:.4f}, {time.perf_counter() - begin:.0f} s", flush=True
        )
        if accuracy >= best_top1:
            best_top1, best_epoch = accuracy, epoch + 1
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
    network.load_state_dict(best_state)
    return network, {
        "epochs": epochs,
        "lr": lr,
        "batch": batch,
        "seed": seed,
        "best_epoch": best_epoch,
        "selection_top1": best_top1,
    }


def pack_images(data: dict[str, np.ndarray]) -> None:
    """Writes the images and labels that ship: the calibration and sensitivity slices, and the whole test set."""
    slices = split_training_images()
    np.savez_compressed(ZOO / "fashion_mnist_test.npz", test_images=data["test_images"], test_labels=data["test_labels"])
    arrays: dict[str, Any] = {}
    for name in ("calibration", "sensitivity"):
        arrays |= {
            f"{name}_images": data["train_images"][slices[name]],
            f"{name}_labels": data["train_labels"][slices[name]],
            f"{name}_index": slices[name].astype(np.int32),
        }
    np.savez_compressed(ZOO / "fashion_mnist_train_slices.npz", **arrays)


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--download", action="store_true", help="let torchvision download the data into --data")
    parser.add_argument("--network", choices=sorted(RECIPES), action="append", help="default: all")
    parser.add_argument("--epochs", type=int, help="default: the network's recipe")
    parser.add_argument("--lr", type=float, help="largest learning rate; default: the network's recipe")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.data
    if options.download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        folder = folder / "FashionMNIST" / "raw"
    data = read_fashion_mnist(folder)
    pack_images(data)
    for name in options.network or sorted(RECIPES):
        epochs, lr = RECIPES[name]
        network, facts = train(name, data, options.epochs or epochs, options.lr or lr, options.batch, options.seed)
        labels = torch.from_numpy(data["test_labels"].astype(np.int64))
        facts["test_top1"] = top1(network, normalise(data["test_images"]), labels)
        facts["torch"] = torch.__version__
        save(name, network)
        print(name, facts, flush=True)
        note(name, facts)


def save(name: str, network: nn.Module) -> None:
    """Writes a network's weights to the zoo."""
    file = ZOO / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, file)
    file.chmod(0o644)  # safetensors makes it readable for its owner only


def note(name: str, facts: dict[str, object]) -> None:
    """Writes what was trained, and the hashes of all files, to the manifest."""
    path = ZOO / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    manifest["networks"][name] = facts
    files = sorted([*ZOO.glob("*.npz"), *ZOO.glob("*.safetensors")])
    manifest["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    path.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
