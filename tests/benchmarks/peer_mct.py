"""Sony's Model Compression Toolkit on the zoo's ResNet-20: same weights, bits, calibration images and bytes; writes PEERS.md.

MCT runs in an environment of its own, with this repository on the path for the network and the images alone:

    uv venv mct && uv pip install --python mct model-compression-toolkit==2.6.1 torch torchvision safetensors numpy
    PYTHONPATH=. OMP_NUM_THREADS=1 mct/bin/python tests/benchmarks/peer_mct.py            # every setting, or name some
    python -m tests.benchmarks.peer_mct --table RUN      # in ours: RUN is the folder of a finished `clado run`

The second appends a line to `peer_mct.jsonl` for each setting and budget, and does not repeat one that is there. The third
compares them with the run's `chosen`, and puts MCT's bits under the run's corrections.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.data import zoo

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "peer_mct.jsonl", HERE / "PEERS.md"
NETWORK, BITS, BUDGETS = "resnet20_fashion_mnist", (2, 4, 8), (2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
CALIBRATION_IMAGES, BATCH, SEED = 1024, 32, 0
GPTQ_EPOCHS = 50
KERNEL = "weight"


@dataclass(frozen=True)
class Setting:
    """One way of running MCT: a weight quantizer, and what differs from the values it ships with."""

    quantizer: str
    text: str
    quantization: tuple[tuple[str, Any], ...] = ()
    search: tuple[tuple[str, Any], ...] = ()
    gptq: bool = False


SETTINGS: dict[str, Setting] = {
    "symmetric": Setting("SYMMETRIC", "as deployed: the weight quantizer of its default target platform"),
    "power_of_two": Setting("POWER_OF_TWO", "symmetric, thresholds that are powers of two"),
    "uniform": Setting("UNIFORM", "affine"),
    "lookup_table": Setting("LUT_SYM_QUANTIZER", "2 and 4 bits index a table of clustered values (8 bits symmetric)"),
    "all_images": Setting(
        "SYMMETRIC", "symmetric, bits searched on all 1,024 images, not on 32", search=(("num_of_images", 1024),)
    ),
    "second_moment": Setting(
        "SYMMETRIC", "symmetric, and second-moment correction, an option", (("weights_second_moment_correction", True),)
    ),
    "gptq": Setting("SYMMETRIC", f"symmetric, then {GPTQ_EPOCHS} epochs of training rounding and biases, an option", gptq=True),
}
HEADER = ["budget", "bytes: MCT", "clado", "MCT, integers", "MCT, any setting", "MCT's bits, ours else", "clado", "gain", "gain"]
GRIDS = ("symmetric", "power_of_two", "uniform")


def calibration_images() -> Tensor:
    """The images that `clado` draws with data.seed 0 (1024, 1, 28, 28)."""
    with np.load(zoo.ZOO / "fashion_mnist_train_slices.npz") as file:
        images = file["calibration_images"]
    return normalise(images[np.random.default_rng(SEED).permutation(len(images))[:CALIBRATION_IMAGES]])


def validation_images() -> tuple[Tensor, Tensor]:
    with np.load(zoo.ZOO / "fashion_mnist_test.npz") as file:
        return normalise(file["test_images"]), torch.from_numpy(file["test_labels"].astype(np.int64))


def normalise(images: np.ndarray) -> Tensor:
    return ((torch.from_numpy(images.astype(np.float32)) / 255 - zoo.MEAN) / zoo.STD).unsqueeze(1)


def sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def network() -> nn.Module:
    from safetensors.torch import load_file

    model = zoo.NETWORKS[NETWORK]()
    model.load_state_dict(load_file(zoo.ZOO / f"{NETWORK}.safetensors"), strict=False)
    return model.eval()


def searched(model: nn.Module) -> dict[str, int]:
    """Weights of each searched layer, by the name of its module."""
    return {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(top-1, mean cross entropy) over all images."""
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(250)])
    return float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits.double(), labels))


def target_platform(setting: Setting) -> Any:
    """MCT's default target (IMX500, version 1.0: 2, 4 and 8 bits per channel), activations left in float."""
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    method = QuantizationMethod[setting.quantizer]

    def edited(config: Any) -> Any:
        config = config.clone_and_edit(enable_activation_quantization=False)
        if kernel := config.attr_weights_configs_mapping.get(KERNEL_ATTR):
            lut = method is QuantizationMethod.LUT_SYM_QUANTIZER and kernel.weights_n_bits == 8
            chosen = QuantizationMethod.SYMMETRIC if lut else method  # MCT's tables index fewer than 8 bits
            config = config.clone_and_edit(attr_to_edit={KERNEL_ATTR: {"weights_quantization_method": chosen}})
        return config

    base, mixed, default = tpc.get_op_quantization_configs()
    offered = sorted(config.attr_weights_configs_mapping[KERNEL_ATTR].weights_n_bits for config in mixed)
    if tuple(offered) != BITS:
        raise ValueError(f"MCT's default target offers {offered} bits; expected {BITS}")
    return tpc.generate_tpc(edited(default), edited(base), [edited(config) for config in mixed], "imx500_weights_only")


def quantized(setting: Setting, model: nn.Module, images: Tensor, limit: float) -> tuple[nn.Module, Any]:
    """MCT's own final network within `limit` bytes of weights, and its report."""
    import model_compression_toolkit as mct

    def representative() -> Iterator[list[Tensor]]:
        yield from ([batch] for batch in images.split(BATCH))

    core = mct.core.CoreConfig(
        quantization_config=mct.core.QuantizationConfig(**dict(setting.quantization)),
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(**dict(setting.search)),
    )
    target, offered = mct.core.ResourceUtilization(weights_memory=limit), target_platform(setting)
    run: Callable[..., Any] = mct.ptq.pytorch_post_training_quantization
    if setting.gptq:
        gptq = mct.gptq.get_pytorch_gptq_config(GPTQ_EPOCHS, gradual_activation_quantization=False)
        run = partial(mct.gptq.pytorch_gradient_post_training_quantization, gptq_config=gptq)
    return run(model, representative, target_resource_utilization=target, core_config=core, target_platform_capabilities=offered)


def chosen_bits(model: nn.Module, layers: dict[str, int]) -> dict[str, int]:
    """Bits of each searched layer as they arrived: read off its quantizer, and no channel has more values than they allow."""
    modules, widths = dict(model.named_modules()), {}
    if holders := [name for name, module in modules.items() if "ActivationQuantization" in type(module).__name__]:
        raise ValueError(f"activations are quantized at {holders[:3]}; expected weights alone")
    for name in layers:
        node = name.replace(".", "_")
        module = modules.get(f"{node}_bn", modules.get(node))  # a batch norm that follows is folded, and the node renamed
        bits = module.weights_quantizers[KERNEL].num_bits
        values = module.get_quantized_weights()[KERNEL].flatten(1)
        if (most := max(len(row.unique()) for row in values)) > 2**bits:
            raise ValueError(f"{name} has {most} values in a channel at {bits} bits")
        widths[name] = bits
    return widths


def size_bytes(layers: dict[str, int], bits: dict[str, int]) -> int:
    """Each tensor packed as one bit stream, as `clado` counts."""
    return sum(-(-count * bits[name] // 8) for name, count in layers.items())


def measure(name: str, budget: float) -> dict[str, Any]:
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    model, images = network(), calibration_images()
    layers = searched(model)
    limit = sum(layers.values()) * budget / 8
    begin = time.perf_counter()
    final, report = quantized(SETTINGS[name], model, images, limit)
    seconds = time.perf_counter() - begin
    bits = chosen_bits(final, layers)
    size, reported = size_bytes(layers, bits), report.final_resource_utilization.weights_memory
    if size != reported or size > limit:
        raise ValueError(f"{size} bytes of weights; MCT reports {reported:g}, the limit is {limit:g}")
    top1, loss = evaluate(final, *validation_images())
    return {
        "setting": name,
        "average_bits": budget,
        "limit_bytes": limit,
        "bytes": size,
        "bits": bits,
        "top1": top1,
        "loss": loss,
        "seconds": round(seconds, 1),
        "calibration_images": len(images),
        "calibration_sha256": sha256(images),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("model-compression-toolkit", "mct-quantizers", "torch", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {torch.get_num_threads()} thread of {os.cpu_count()} cores"


def done() -> dict[tuple[str, float], dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(row["setting"], row["average_bits"]): row for row in rows}


Rows = dict[tuple[str, float], dict[str, Any]]


@dataclass(frozen=True)
class Ours:
    """What the run chose for a budget, and the accuracy of MCT's bits under the run's grids and corrections."""

    size_bytes: int
    chosen: Any
    peer: Any


def best(rows: Rows, budget: float, settings: Sequence[str]) -> dict[str, Any]:
    """MCT's most accurate network of a budget, of the settings that were run; of two the one of less loss."""
    return max((rows[name, budget] for name in settings if (name, budget) in rows), key=lambda r: (r["top1"], -r["loss"]))


def ours(folder: Path, peers: dict[float, dict[str, Any]]) -> tuple[dict[float, Ours], Any, Any]:
    """(figures for each budget that the run has, its record, its run). `peers`: MCT's row of each budget."""
    from clado.evaluation import evaluate_weights
    from clado.records.results import CHOSEN
    from clado.records.run_record import RunRecord
    from clado.run.opened_run import open_run
    from clado.settings.loading import load_config

    record = RunRecord.load(folder / "record.json")
    run = open_run(load_config(folder / "config.yaml", [f"folder={json.dumps(str(folder))}"]))
    if record.network != f"zoo:{NETWORK}" or tuple(run.config.bits) != BITS:
        raise SystemExit(f"{folder} is of {record.network} with bits {run.config.bits}; expected zoo:{NETWORK} with {BITS}")
    answers = {}
    for budget, row in peers.items():
        result = record.find(f"{budget:.12g} bits", CHOSEN)
        if result is None:
            continue
        bits = tuple(row["bits"][name.removesuffix(".weight")] for name in record.layer_names)
        assignment = replace(result.assignment, bits=bits)
        if run.space.size_bytes(assignment) != row["bytes"] or result.size_bytes > row["limit_bytes"]:
            raise SystemExit(f"{budget:g} bits: {row['bytes']:,} and {result.size_bytes:,} bytes are not of one budget")
        peer = evaluate_weights(*run.preparation.corrected.deployed(assignment), run.slices.validation)
        answers[budget] = Ours(result.size_bytes, result.validation, peer)
    if not answers:
        raise SystemExit(f"{folder} has none of the budgets {BUDGETS}; it has {', '.join(record.budgets)}")
    return answers, record, run


TEXT = """# Against Sony's Model Compression Toolkit

Written by `tests/benchmarks/peer_mct.py`. MCT's figures, with the bits of every layer, are in `peer_mct.jsonl`.

Both quantize the zoo's `{network}`, with the same weights and {calibration}. 22 layers have {bits} bits each,
first and last included. Only weights are quantized, with one scale for each channel. Biases stay in float. Top-1 in percent
on {images}, cross entropy in brackets; float: {float_}. A budget limits the bytes of the searched weights, Σ n·b / 8. MCT gets
the same number as its weights memory. What it reports is what its bits add up to.

MCT's own final network is that of its post-training quantization, with bias correction. The column "MCT, integers" has
the best of its weight quantizers with integer grids ({grids}), with all else as it ships. The best is picked *at that budget,
on the test images*. The column "MCT, any setting" has the best of everything below. The gains are clado's over the first
and over the second.

{main}

Of {budgets} budgets clado is at least as good as MCT with integer grids at {ahead} by top-1 and {lower} by loss. It is at
least as good as the best of all of MCT's settings at {ahead_of_all} by top-1 and {loss_of_all} by loss. A top-1 of 94 % on
10,000 images has a standard error of 0.24 points. Differences have rather less, because the images are the same. MCT's bits
under our grids and corrections do at least as well as clado's own bits at {bits_alone} of {budgets} by top-1. There the
choice of bits gains nothing.

## MCT's settings

{settings}

{all}

{unmeasured}The setting `lookup_table` is not a grid of integers. A weight is one of 4 or 16 values of 8 bits, times
the scale of its channel. The layer is free to choose the values. So there is no arithmetic on the codes themselves.

## What is not equal

For clado:

- It measures on {sensitivity} unlabelled images beside the calibration images{labels}. MCT has the calibration images alone. As
  deployed it searches bits on the first 32 of them (`all_images`: on all of them).
- Its network has the corrections {corrections}. MCT's as deployed has bias correction. The column "MCT's bits, ours else" puts
  the bits of "MCT, integers" under our grids and corrections. The difference to clado's is then the choice of bits
  alone.{rounding}{more}
- It measures its final candidates and keeps the best one on the sensitivity images. That takes longer: {our_seconds:.0f} s for
  all budgets with {threads}, evaluation included. MCT takes {fastest:.0f} to {slowest:.0f} s a budget with one thread ("MCT,
  integers"), evaluation not included, on a machine that had other work.
- MCT is made for one target that rounds activations to 8 bits, and offers a gradient-based method (its "GPTQ")
  where post-training quantization loses too much, as at 2 bits. It is not in "MCT, integers".

For MCT:

- Its symmetric grid of b bits has 2^b values (−2, −1, 0, 1 times the scale at 2 bits). Ours has 2^b − 1 (−1, 0, 1). We pay
  for a code that we leave unused.{affine}
- Its quantizer, and the best of its settings, are chosen on the test images; ours chose nothing on them.
- Scales are not counted in bytes: {scales}
  A table of `lookup_table`, at most 16 bytes a layer, is not counted either.{activations}

## Again

    uv venv mct --python 3.11
    uv pip install --python mct model-compression-toolkit==2.6.1 torch torchvision safetensors numpy
    PYTHONPATH=. OMP_NUM_THREADS=1 mct/bin/python tests/benchmarks/peer_mct.py
    clado run CONFIG                      # with {config}
    python -m tests.benchmarks.peer_mct --table RUN

Lines of `peer_mct.jsonl` that are there are not measured again; delete the file to start anew. MCT:
{versions}; {machine}. clado {clado}, torch {torch}.
"""


UNMEASURED_ROUNDING = """
- Our corrections include `{}`, rounding that is fitted to the calibration images. MCT's counterpart, its gradient-based
  method, was not measured, so nothing here says that clado is better than that."""
MORE_IMAGES = """
- clado calibrates on {} images here, MCT on {}: what more images would give MCT was not measured."""


def table(run: Path) -> str:
    """PEERS.md."""
    import clado
    from clado.quantization.preparation import names_of
    from clado.records.text import markdown_table, percent
    from tests.benchmarks.pages import filled

    def figure(top1: float, loss: float) -> str:
        return f"{percent(top1)} ({loss:.3f})"

    rows = done()
    if missing := [f"{name} at {budget:g}" for name in GRIDS for budget in BUDGETS if (name, budget) not in rows]:
        raise SystemExit(f"{RESULTS.name} lacks {', '.join(missing)}; run this script in MCT's environment first")
    settings = [name for name in SETTINGS if any((name, budget) in rows for budget in BUDGETS)]
    absent = [name for name in SETTINGS if name not in settings]
    peers = {budget: best(rows, budget, GRIDS) for budget in BUDGETS}
    answers, record, opened = ours(run, peers)
    config, calibration = opened.config, opened.slices.calibration
    shown = []
    for budget, mine in answers.items():
        one, any_ = peers[budget], best(rows, budget, settings)
        cells = [f"{budget:g} bits", f"{one['bytes']:,}", f"{mine.size_bytes:,}"]
        cells += [
            f"{figure(one['top1'], one['loss'])} {one['setting']}",
            f"{figure(any_['top1'], any_['loss'])} {any_['setting']}",
        ]
        cells += [figure(accuracy.top1, accuracy.loss) for accuracy in (mine.peer, mine.chosen)]
        shown.append([*cells, *(f"{100 * (mine.chosen.top1 - row['top1']):+.2f}" for row in (one, any_))])
    everything = []
    for budget in BUDGETS:
        cells = [rows.get((name, budget)) for name in settings]
        everything.append([f"{budget:g} bits", *(figure(row["top1"], row["loss"]) if row else "–" for row in cells)])

    def at_least(candidates: Sequence[str], figure: str) -> int:
        """Budgets at which ours is as good as the best of MCT's."""
        sign = 1 if figure == "top1" else -1
        return sum(
            sign * getattr(mine.chosen, figure)
            >= max(sign * rows[name, budget][figure] for name in candidates if (name, budget) in rows)
            for budget, mine in answers.items()
        )

    same = sha256(calibration.load(0, len(calibration))[0]) == peers[BUDGETS[0]]["calibration_sha256"]
    fitted = [name for name in config.corrections if name in ("gptq", "adaround")]
    images, floats = record.float_accuracy.num_images, record.float_accuracy
    widths, channels = ", ".join(map(str, config.activations.bits)), sum(layer.num_channels for layer in opened.space.layers)
    seconds = [row["seconds"] for row in peers.values()]
    workers, threads = config.cluster.workers, config.cluster.threads_per_worker
    text = TEXT.format(
        network=NETWORK,
        bits=", ".join(map(str, BITS[:-1])) + f" or {BITS[-1]}",
        calibration=f"the same {CALIBRATION_IMAGES} calibration images"
        if same
        else f"NOT THE SAME CALIBRATION IMAGES: {CALIBRATION_IMAGES} for MCT, {len(calibration)} for this run",
        images="the 10,000 test images"
        if images == 10_000
        else f"the 10,000 test images for MCT, ONLY {images} OF THEM for clado",
        float_=figure(floats.top1, floats.loss),
        grids=", ".join(f"`{name}`" for name in GRIDS),
        main=markdown_table(HEADER, shown),
        settings="\n".join(f"- `{name}`: {SETTINGS[name].text}" for name in settings),
        all=markdown_table(["budget", *settings], everything),
        unmeasured=f"Not measured: {', '.join(f'`{name}`' for name in absent)}. " if absent else "",
        budgets=len(answers),
        ahead=at_least(GRIDS, "top1"),
        lower=at_least(GRIDS, "loss"),
        ahead_of_all=at_least(settings, "top1"),
        loss_of_all=at_least(settings, "loss"),
        bits_alone=sum(mine.peer.top1 >= mine.chosen.top1 for mine in answers.values()),
        rounding="" if "gptq" in settings or not fitted else UNMEASURED_ROUNDING.format(" and ".join(fitted)),
        more="" if len(calibration) <= CALIBRATION_IMAGES else MORE_IMAGES.format(len(calibration), CALIBRATION_IMAGES),
        sensitivity=len(opened.slices.sensitivity),
        labels="" if config.criterion == "kl_to_float" else ", and uses their labels",
        corrections=names_of(config.corrections),
        our_seconds=sum(record.seconds.values()),
        threads="one thread" if workers * threads == 1 or config.cluster.name == "inline" else f"{workers} × {threads} threads",
        fastest=min(seconds),
        slowest=max(seconds),
        affine="" if config.quantizer.scheme == "symmetric" else " (Not in this run: its grids are affine, with 2^b values.)",
        scales=f"ours are {channels} float32 numbers, {4 * channels:,} bytes; `power_of_two` could do with {channels}.",
        activations=f"\n- This run of ours rounds activations to {widths} bits; MCT leaves them in float." if widths else "",
        config=f"corrections: [{', '.join(config.corrections)}]",
        versions=", ".join(f"{name} {version}" for name, version in peers[BUDGETS[0]]["versions"].items()),
        machine=peers[BUDGETS[0]]["machine"],
        clado=clado.__version__,
        torch=torch.__version__,
    )
    return filled(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with Sony's Model Compression Toolkit.")
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all if none is named")
    parser.add_argument("--table", type=Path, metavar="RUN", help="write PEERS.md from the results and this finished run")
    parser.add_argument("--out", type=Path, default=TABLE, help="where --table writes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        options.out.write_text(table(options.table), encoding="utf-8")
        return
    for name in options.settings or SETTINGS:
        for budget in BUDGETS:
            if (name, budget) in done():
                continue
            row = measure(name, budget)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name} {budget:g}: {row['bytes']:,} bytes, {row['top1']:.2%}, {row['loss']:.4f}, {row['seconds']} s", flush=True
            )


if __name__ == "__main__":
    main()
