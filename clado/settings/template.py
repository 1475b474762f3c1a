"""The commented configuration that `clado init` writes. What it sets are the defaults; what is commented out has none."""

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
  # weights: FILE.safetensors        # default: those that the factory gives
"""
_ZOO_DATA = """\
  source: zoo                        # zoo, or folder: images in one sub-folder a class, or train/ and val/ of such
"""
_FOLDER_DATA = """\
  source: folder                     # images in one sub-folder a class, or train/ and val/ of such
  path: {data}
  # resize: 256                      # shorter side in pixels before the centre crop; default: the weights' own, else the crop's
  # mean: [0.485, 0.456, 0.406]      # subtracted from pixels in 0..1, one value a channel; default: the weights' own, else these
  # std: [0.229, 0.224, 0.225]       # then divides them
  # class_balanced: true             # as many images of each class in every slice
  # max_corrupt_images: 10           # so many unreadable images are named and left out; default: none
  # factory: my_lab.data:images      # with source: factory and no path: a function that returns (images, targets)
"""
_TEMPLATE = """\
# Settings of `clado run`; everything but network has a default. Override one with: clado run FILE data.seed=1
network:
{network}\
  # fixed: [conv1.weight]            # name patterns of layers that stay in float
  # split: ["*.in_proj_weight"]      # attention weights whose queries, keys and values are layers of their own
  # numeric: tf32                    # arithmetic: float32; faster on GPUs and less exact: tf32, bfloat16
  # channels_last: true              # memory layout; faster on GPUs; default: where it is faster on CPUs
data:                                # three disjoint sets
{data}\
  {sensitivity_images}# half propose bits, half decide; more is more exact, and costs in proportion
  {calibration_images}# fit ranges and corrections; without labels
  # validation_images: 1000          # give the reported accuracy, seen by no choice; default: all there are
  # selection_images: 1000           # of the images left over, for `clado smallest`; default: all
  {sample_blocks}# parts of the sensitivity set whose losses are kept apart
  seed: 0                            # which images
bits: [2, 4, 8]                      # candidate widths of each layer, ascending within 1..16
# layers:
#   bits: {{"fc.weight": [8]}}         # other candidates for layers by name pattern; a single one pins them
#   ties: [["layer1.*"]]             # groups of layers that must share a bit-width
#   blocks: [["layer1.*"]]           # blocks of layers for blockwise; default: those of the module tree
quantizer:
  weights: mse                       # range of the codes: mse, minmax or percentile
  granularity: per_channel           # one scale per_channel or per_tensor
  scheme: symmetric                  # symmetric or affine
activations:                         # inputs of the searched layers
  bits: []                           # empty: float; [8]: all at 8 bits, as in the paper; [4, 8]: candidates beside the weights'
  range: mse                         # of the codes, on the calibration images: mse, minmax or percentile
corrections: [equalization, gptq, output_statistics, batchnorm_reestimation]  # measured and deployed; []: rounding to nearest
# adaround:                          # where it is among the corrections
#   steps: 1000                      # of its optimiser, for one layer at one width
# effort: best                       # answers are reconstructed too, on calibration images: balanced (minutes) or best
criterion: kl_to_float               # what must not grow: kl_to_float, cross_entropy (needs labels), or package.module:name
# metric: my_lab.metrics:mean_iou    # (outputs, targets) -> a number for each image; more is better
estimators: [layerwise, gauss_newton]  # compared as measured; also pairwise, blockwise, tempered2, hawq, mpqco, …
# gradients:                         # what hawq, mpqco and fisher draw at random
#   vectors: 8                       # of hawq's trace, in each sample block
#   seed: 0
budgets:
  average_bits: [2.25, 2.5, 3, 3.5, 4, 5]  # per searched weight
  # size_bytes: [100000]             # bytes of the searched weights
  # percent_of_8_bit: [40]           # of the bytes at 8 bits everywhere
  # bops: [4.0e+9]                   # bit operations of one image: MACs x weight x activation bits (8 for float)
# constraints:                       # hold beside every budget; latency and table read a CSV: layer,bits[,activation_bits],UNIT
#   - {{kind: latency, bound: 0.002, path: latency.csv}}
solver:
  name: scip                         # scip proves optimality; greedy and exhaustive (tiny networks) need no package
  time_limit: 60                     # seconds for one budget
search:                              # around the best proposal of each budget, on the measured loss
  evaluations: 0                     # losses measured for one budget at most, such as 8; 0: no search
  batch: 4                           # of them measured at a time, by as many workers
cluster:
  kind: local                        # processes of this machine; or local_gpus, address, ssh, slurm, kubernetes, inline
  workers: 2
  threads_per_worker: 1
  # share_gpus: true                 # kind local_gpus: more workers than GPUs
  # address: tcp://127.0.0.1:8786    # kind address: a Dask scheduler that runs already
  # ssh: {{hosts: [node1, node2]}}     # kind ssh: machines that workers are dealt out to
  # slurm: {{memory: 16GB, gpus: 1}}   # kind slurm: of the batch job of each worker
  # kubernetes: {{image: "registry/clado:0.1.0"}}  # kind kubernetes: of the pod of each worker
  # tls: {{ca_file: ca.pem, cert: cert.pem, key: key.pem}}  # encrypts Dask's connections; `clado certificates` makes some
  # start_timeout: 300               # seconds without any worker until the run ends
tracking:
  experiment: clado                  # in MLflow
  # uri: http://localhost:5000       # default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here
  # models: false                    # true logs the chosen networks and registers them, with an alias per budget
# folder: runs/mine                  # where the run is kept; default: named after the settings
# store: s3://BUCKET/PREFIX          # what is measured, in a bucket; default: store.zarr in that folder
"""


LEAST_IMAGES = 16
"""Images of a folder that are split between calibration, sensitivity and validation, at least."""
DEFAULTS = DataSettings()


def sizes(num_images: int, has_validation: bool) -> dict[str, int]:
    """Sizes of the sets that a folder has images for: the defaults, or an eighth for sensitivity and a quarter for calibration.

    Args:
        num_images: Images that these sets are taken from.
        has_validation: Whether validation images are apart, so that none are left over for them.

    Raises:
        DataError: There are fewer than `LEAST_IMAGES`.
    """
    if num_images < LEAST_IMAGES:
        raise DataError(f"the folder holds {num_images} images to calibrate and measure on; expected {LEAST_IMAGES} at least")
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

    Both or neither of `network` and `data`: the zoo's images fit the zoo's network only. `of_data`: `sizes` of the folder's sets.
    """
    of_data = of_data or {name: getattr(DEFAULTS, name) for name in ("sensitivity_images", "calibration_images", "sample_blocks")}
    lines = {name: f"{name}: {count}".ljust(35) for name, count in of_data.items()}
    if (network is None) != (data is None):
        argument, absent = ("network", "data FOLDER") if data is None else ("data", "network package.module:function")
        raise ConfigurationError(f"--{argument} is given without --{absent}; expected both, or neither for the zoo's demo")
    if network is None or data is None:
        text = _TEMPLATE.format(network=_ZOO_NETWORK, data=_ZOO_DATA, **lines)
    else:
        # A JSON string is a YAML scalar whatever characters it holds.
        own_network = _FACTORY_NETWORK.format(network=json.dumps(network, ensure_ascii=False))
        text = _TEMPLATE.format(network=own_network, data=_FOLDER_DATA.format(data=json.dumps(data, ensure_ascii=False)), **lines)
    parse_config(yaml.safe_load(text), "clado init")
    return text
