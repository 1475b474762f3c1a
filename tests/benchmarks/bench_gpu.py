"""ResNet-50 at 224 pixels, bits (2, 4, 8): seconds of `pairwise` and `gauss_newton` on one GPU, in pieces that can be resumed.

Figures of an H200: GPU.md beside this file.

Needs torch and NumPy and this repository, nothing else (the network is written out below: the architecture of He et al. 2015,
arXiv 1512.03385, with the stride in the 3 × 3 convolution; random weights, since speed does not depend on them):

    python -m tests.benchmarks.bench_gpu --images 64 --numeric tf32 --channels-last --state gpu-64.json

Each call works for at most --minutes (8). It writes what it did to --state after every sample block, and prints the sums so
far. Call it again until it says `complete`. Seconds are sums over blocks, with the device synchronised around each. A block's
`pairs` are measured in row tiles, so that a piece ends in time. At the end it prints seconds, achieved TFLOP/s, the ratio to the
floor, and peak memory. The floor is Σ over pairs of the operators behind the cut, each at its best batch size, measured in the
same call.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, Workload, sample_blocks
from clado.measuring.workbench import Workbench
from clado.network.graph import Graph
from clado.network.network import Network, Numeric
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions with a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet-50; other depths for trying the script out."""
    blocks: list[nn.Module] = []
    channels = 64
    for stage, depth in enumerate(depths):
        for k in range(depth):
            blocks.append(Bottleneck(channels, 64 * 2**stage, 2 if stage and not k else 1))
            channels = 256 * 2**stage
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def synchronised(device: torch.device) -> float:
    """Seconds of the clock once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def floor_seconds(network: Network, plan: Plan, size: int, batches: tuple[int, ...]) -> dict[str, float]:
    """Σ over the plan's probes of the operators after the cut, each at its best batch size; `inference`: a whole image."""
    graph = network.engine
    assert isinstance(graph, Graph)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = network.numeric == "tf32"
    best = np.full(len(graph.instructions), np.inf)
    for batch in batches:
        images = torch.randn(batch, 3, size, size, device=network.device)
        if network.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for _ in range(4):
            state = graph.start(images)
            for k in range(len(best)):
                begin = synchronised(network.device)
                with torch.autocast(network.device.type, torch.bfloat16, enabled=network.numeric == "bfloat16"):
                    state = graph.run(state, k + 1, {})
                best[k] = min(best[k], (synchronised(network.device) - begin) / batch)
    suffix, offsets = [float(best[place.cut.position :].sum()) for place in graph.layers], plan.space.offsets
    pairs = sum((offsets[j + 1] - offsets[j]) * offsets[j] * suffix[j] for j in range(plan.space.num_layers))
    singles = sum(suffix[option.layer] for option in plan.space.options)
    num_images = plan.sample_blocks[-1][1]
    return {"pairs": pairs * num_images, "gram": singles * num_images, "inference": float(best.sum())}


def effect(num_images: int = 256) -> str:
    """Markdown: the change of the shipped ResNet-20's pairwise matrix in each numeric mode, with its standard errors."""
    from clado.data.sources import load_data, load_network
    from clado.interaction import estimators
    from clado.interaction.estimators import Measured
    from clado.settings.schema import DataSettings, NetworkSettings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_network(NetworkSettings(source="zoo", name="resnet20_fashion_mnist"))
    images = load_data(DataSettings(sensitivity_images=num_images), loaded.image_shape).sensitivity
    blocks = sample_blocks(num_images, 16)
    counts = np.array([stop - start for start, stop in blocks])
    matrices = {}
    for numeric in get_args(Numeric):
        network = Network(loaded.model.to(device), loaded.example_input.to(device), numeric=numeric)
        ready = prepare(network, network.search_space((2, 4, 8)), Recipe(WeightQuantizer()))
        bench = Workbench(ready, "kl_to_float", blocks, images.load)
        plan = Plan(ready.space, blocks, ("singles", "pairs"), ready.space.num_options)
        tiles: dict[Any, list[Any]] = {"singles": [], "pairs": []}
        begin = synchronised(device)
        for tile in plan.tiles:
            tiles[tile.kind].append(measure_tile(bench, tile))
        seconds = synchronised(device) - begin
        sums = {kind: np.stack(parts) for kind, parts in tiles.items()}
        matrices[numeric] = estimators.estimate("pairwise", Measured(ready.space, "kl_to_float", counts, sums)), seconds
    reference = matrices["float32"][0]
    assert reference.standard_error is not None
    lines = [
        "| numeric | seconds | diagonal: relative change | pairs: relative change | median change / standard error | "
        "pairs that change by more than a standard error |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    inside, diagonal = reference.in_layer_mask(), np.eye(len(reference.values), dtype=bool)
    for numeric, (matrix, seconds) in matrices.items():
        change = np.abs(matrix.values - reference.values)
        share = [float(np.linalg.norm(change[mask]) / np.linalg.norm(reference.values[mask])) for mask in (diagonal, ~inside)]
        ratio = change[~inside] / reference.standard_error[~inside]
        cells = [
            numeric,
            f"{seconds:.1f}",
            *(f"{value:.1e}" for value in (*share, np.median(ratio))),
            f"{100 * (ratio > 1).mean():.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls measured, refused where they had other settings."""
    if not path.exists():
        return {"settings": settings, "tiles": {}, "peak_bytes": 0}
    state: dict[str, Any] = json.loads(path.read_text())
    if state["settings"] != settings:
        raise SystemExit(f"{path} was begun with {state['settings']}; this call has {settings}: name another --state")
    return state


def main() -> None:
    """One piece, then the sums so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=None, help="sample blocks; default: one for each 64 images")
    parser.add_argument("--numeric", choices=["float32", "tf32", "bfloat16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch-images", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--state", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="four blocks at 32 pixels: to try the script out")
    parser.add_argument("--effect", action="store_true", help="what tf32 and bfloat16 do to a matrix; needs clado installed")
    arguments = parser.parse_args()
    if arguments.effect:
        print(effect())
        return
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, depths = (32, (1, 1, 1, 1)) if arguments.tiny else (224, (3, 4, 6, 3))
    settings = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{key: getattr(arguments, key) for key in ("images", "blocks", "numeric", "channels_last", "batch_images", "tiny")},
    }
    state = load(arguments.state, settings)
    torch.manual_seed(0)
    model = resnet50(depths).eval().to(device)
    if arguments.channels_last:
        model = model.to(memory_format=torch.channels_last)
    images = torch.randn(arguments.images, 3, size, size)
    example = images[:2].to(device)
    network = Network(model, example, numeric=arguments.numeric, channels_last=arguments.channels_last)
    space = network.search_space((2, 4, 8))
    blocks = sample_blocks(len(images), arguments.blocks or max(1, len(images) // 64))
    prepared = prepare(network, space, Recipe(WeightQuantizer()))
    bench = Workbench(prepared, "kl_to_float", blocks, lambda a, b: (images[a:b], None), arguments.batch_images)
    plan = Plan(space, blocks, ("pairs", "gram"), max(1, space.num_options // 6))
    measure_tile(bench, plan.tiles[0])  # warms up; counted again below
    longest = 0.0
    for tile in plan.tiles:
        key = f"{tile.kind} {tile.sample_block} {tile.number}"
        if key in state["tiles"]:
            continue
        if time.perf_counter() - begin + 1.5 * longest > 60 * arguments.minutes:
            break
        start = synchronised(device)
        measure_tile(bench, tile)
        state["tiles"][key] = synchronised(device) - start
        longest = max(longest, state["tiles"][key])
        if device.type == "cuda":
            state["peak_bytes"] = max(state["peak_bytes"], torch.cuda.max_memory_allocated(device))
        arguments.state.write_text(json.dumps(state))
    if "floor" not in state and len(state["tiles"]) == len(plan.tiles):
        state["floor"] = floor_seconds(network, plan, size, (8, 16) if arguments.tiny else (16, 64, 256))
        arguments.state.write_text(json.dumps(state))
    print(report(state, plan, network))


def report(state: dict[str, Any], plan: Plan, network: Network) -> str:
    """The sums so far, in lines."""
    work = Workload(network.macs, tuple(place.cut.suffix_macs for place in network.places))
    complete = len(state["tiles"]) == len(plan.tiles)
    lines = [f"{state['settings']}", f"{len(state['tiles'])} of {len(plan.tiles)} tiles{': complete' if complete else ''}"]
    done = [tile for tile in plan.tiles if f"{tile.kind} {tile.sample_block} {tile.number}" in state["tiles"]]
    for kind in ("pairs", "gram"):
        spent = sum(seconds for key, seconds in state["tiles"].items() if key.startswith(kind))
        if spent:
            macs = sum(plan.macs(tile, work) for tile in done if tile.kind == kind)
            line = f"{kind}: {spent:.2f} s, {2 * macs / spent / 1e12:.3f} TFLOP/s"
            lines.append(line + (f", {spent / state['floor'][kind]:.2f} x floor" if "floor" in state else ""))
    if "floor" in state:
        rate = 2 * network.macs / state["floor"]["inference"] / 1e12
        lines.append(f"inference: {rate:.3f} TFLOP/s (operators, each at its best batch size)")
    lines.append(f"peak memory: {state['peak_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
