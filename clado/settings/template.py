"""The commented configuration that `clado init` writes. It sets the defaults. Keys that are commented out are optional."""

import json
from collections.abc import Mapping

import yaml

from clado.errors import ConfigurationError, DataError
from clado.settings.loading import parse_config
from clado.settings.schema import DataSettings

_ZOO_NETWORK = """\
  source: zoo                        # zoo, torchvision or timm (by name), or factory (package.module:function)
  name: resnet20_fashion_mnist
  # weights: FILE.safetensors        # other weights for the same architecture, or random
"""
_FACTORY_NETWORK = """\
  source: factory                    # zoo, torchvision or timm (by name), or factory (package.module:function)
  name: {network}  # returns a torch.nn.Module, or (module, example input)
  # image_shape: [3, 224, 224]       # channels, height, width; needed unless the factory returns an example input
  # weights: FILE.safetensors        # default: the weights that the factory returns
"""
_ZOO_DATA = """\
  source: zoo                        # zoo, or folder: images in one sub-folder for each class, or in train/ and val/
"""
_FOLDER_DATA = """\
  source: folder                     # images in one sub-folder for each class, or in train/ and val/
  path: {data}
  # resize: 256                      # shorter side in pixels before the centre crop; default: from the weights, else the crop's
  # mean: [0.485, 0.456, 0.406]      # subtracted from pixels in 0..1, one a channel; default: from the weights, else these
  # std: [0.229, 0.224, 0.225]       # then divides them
  # class_balanced: true             # equally many images of each class in every set
  # max_corrupt_images: 10           # most unreadable images that are left out; default: none
  # factory: my_lab.data:images      # with source: factory and no path: a function that returns (images, targets)
"""
_TEMPLATE = """\
# Settings of `clado run`; everything but network has a default. Override one with: clado run FILE data.seed=1
network:
{network}\
  # fixed: [conv1.weight]            # name patterns of layers that stay in float
  # split: ["*.in_proj_weight"]      # attention weights whose queries, keys and values become separate layers
  # numeric: tf32                    # arithmetic: float32; faster on GPUs and less exact: tf32, bfloat16
  # channels_last: true              # memory layout; faster on GPUs; default: only if it is faster on the CPU
data:                                # three disjoint sets
{data}\
  {sensitivity_images}# half are measured, half decide; more images are more exact, and take longer
  {calibration_images}# to fit ranges and corrections; they need no labels
  # validation_images: 1000          # for the reported accuracy only; default: all remaining images
  # selection_images: 1000           # of the remaining images, for `clado smallest`; default: all
  {sample_blocks}# parts of the sensitivity set with separate losses, for standard errors
  seed: 0                            # seed of the choice of images
bits: [2, 4, 8]                      # candidate widths of each layer, ascending within 1..16; float may come last
# layers:
#   bits: {{"fc.weight": [8]}}         # other candidates for layers by name pattern; a single one pins them
#   ties: [["layer1.*"]]             # groups of layers that must share a bit-width
#   blocks: [["layer1.*"]]           # blocks of layers for blockwise; default: those of the module tree
quantizer:
  weights: mse                       # range of the codes: mse, minmax or percentile
  granularity: per_channel           # one scale per_channel or per_tensor
  scheme: symmetric                  # symmetric or affine
activations:                         # inputs of the searched layers
  bits: []                           # empty: float; [8]: all at 8 bits, as in the paper; [4, 8]: candidates, as for weights
  range: mse                         # range of their codes: mse, minmax or percentile
corrections: [equalization, gptq, output_statistics, batchnorm_reestimation]  # measured and deployed; []: rounding to nearest
# adaround:                          # read only if adaround is among the corrections
#   steps: 1000                      # steps of its optimiser, for one layer at one width
# effort: best                       # also reconstructs the answers on calibration images: balanced (minutes) or best
criterion: kl_to_float               # the loss that must not grow; also cross_entropy (needs labels), or package.module:name
# metric: my_lab.metrics:mean_iou    # (outputs, targets) -> a number for each image; more is better
estimators: [layerwise, gauss_newton]  # their answers are measured; also pairwise, blockwise, tempered2, hawq, mpqco, …
# gradients:                         # random numbers of hawq, mpqco and fisher
#   vectors: 8                       # random vectors of hawq's trace, in each sample block
#   seed: 0
budgets:
  average_bits: [2.25, 2.5, 3, 3.5, 4, 5]  # average bits per searched weight
  # size_bytes: [100000]             # bytes of the searched weights
  # percent_of_8_bit: [40]           # percent of the bytes at 8 bits everywhere
  # bops: [4.0e+9]                   # bit operations of one image: MACs x weight x activation bits (8 for float)
  # latency: [0.002]                 # seconds of one image in the runtime, by the table of `clado profile`
# constraints:                       # limits for every budget; latency and table read a CSV: layer,bits[,activation_bits],UNIT
#   - {{kind: latency, bound: 0.002, path: latency.csv}}
# runtime: {{name: onnxruntime, candidates: native}}  # times the chosen networks; native: no candidates without kernels
solver:
  name: scip                         # scip proves optimality; greedy and exhaustive (tiny networks) need no package
  time_limit: 60                     # seconds for one budget
search:                              # local search from the best proposal of each budget
  evaluations: 0                     # most losses that are measured for one budget, such as 8; 0: no search
  batch: 4                           # losses that are measured at a time, one by each worker
cluster:
  kind: local                        # processes on this machine; or local_gpus, address, ssh, slurm, kubernetes, inline
  workers: 2
  threads_per_worker: 1
  # share_gpus: true                 # kind local_gpus: several workers may share a GPU
  # address: tcp://127.0.0.1:8786    # kind address: a Dask scheduler that already runs
  # ssh: {{hosts: [node1, node2]}}     # kind ssh: machines on which workers are started
  # slurm: {{memory: 16GB, gpus: 1}}   # kind slurm: the batch job of each worker
  # kubernetes: {{image: "registry/clado:0.1.0"}}  # kind kubernetes: the pod of each worker
  # tls: {{ca_file: ca.pem, cert: cert.pem, key: key.pem}}  # encrypts Dask's connections; `clado certificates` makes some
  # start_timeout: 300               # seconds without any worker until the run ends
tracking:
  experiment: clado                  # name of the experiment in MLflow
  # uri: http://localhost:5000       # default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here
  # models: false                    # true: MLflow gets the chosen networks, with an alias for each budget
# folder: runs/mine                  # folder of the run; default: a name made from the settings
# store: s3://BUCKET/PREFIX          # bucket for measurements; default: store.zarr in that folder
"""


LEAST_IMAGES = 16
"""Least number of images in a folder, for calibration, sensitivity and validation together."""
DEFAULTS = DataSettings()


def sizes(num_images: int, has_validation: bool) -> dict[str, int]:
    """Sizes of the sets for a folder: the defaults, or if it is small, an eighth for sensitivity and a quarter for calibration.

    Args:
        num_images: Images that these sets are taken from.
        has_validation: Whether the folder has separate validation images. Then no images are left for them.

    Raises:
        DataError: There are fewer than `LEAST_IMAGES`.
    """
    if num_images < LEAST_IMAGES:
        raise DataError(f"the folder holds {num_images} images to calibrate and measure on; expected {LEAST_IMAGES} or more")
    share = 3 if has_validation else 8
    if num_images >= share * DEFAULTS.sensitivity_images:
        sensitivity, calibration = DEFAULTS.sensitivity_images, DEFAULTS.calibration_images
    else:
        sensitivity, calibration = num_images // share, 2 * (num_images // share)
    return {
        "sensitivity_images": sensitivity,
        "calibration_images": calibration,
        "sample_blocks": min(DEFAULTS.sample_blocks, sensitivity),
    }


def render(network: str | None = None, data: str | None = None, of_data: Mapping[str, int] | None = None) -> str:
    """The YAML for the zoo's demo, or for a factory `package.module:function` and an image folder. Raises ConfigurationError.

    Give both `network` and `data` or neither: the zoo's images fit only its networks. `of_data` are the `sizes` of the sets.
    """
    of_data = of_data or {name: getattr(DEFAULTS, name) for name in ("sensitivity_images", "calibration_images", "sample_blocks")}
    lines = {name: f"{name}: {count}".ljust(35) for name, count in of_data.items()}
    if (network is None) != (data is None):
        argument, absent = ("network", "data FOLDER") if data is None else ("data", "network package.module:function")
        raise ConfigurationError(f"--{argument} is given without --{absent}; expected both, or neither for the zoo's demo")
    if network is None or data is None:
        text = _TEMPLATE.format(network=_ZOO_NETWORK, data=_ZOO_DATA, **lines)
    else:
        # A JSON string is a YAML scalar, for any characters.
        own_network = _FACTORY_NETWORK.format(network=json.dumps(network, ensure_ascii=False))
        text = _TEMPLATE.format(network=own_network, data=_FOLDER_DATA.format(data=json.dumps(data, ensure_ascii=False)), **lines)
    parse_config(yaml.safe_load(text), "clado init")
    return text
