"""The commented configuration that `clado init` writes. What it sets are the defaults; what is commented out has none."""

import json

import yaml

from clado.config import parse_config
from clado.errors import ConfigurationError

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
  # resize: 256                      # shorter side in pixels before the centre crop; default: the crop's
  mean: [0.485, 0.456, 0.406]        # subtracted from pixels in 0..1, one value a channel
  std: [0.229, 0.224, 0.225]         # then divides them
"""
_TEMPLATE = """\
# Settings of `clado run`; everything but network has a default. Override one with: clado run FILE data.seed=1
network:
{network}\
  # fixed: [conv1.weight]            # name patterns of layers that stay in float
data:                                # three disjoint sets
{data}\
  sensitivity_images: 256            # measured on: more is more exact, and costs in proportion
  calibration_images: 256            # fit ranges and corrections
  # validation_images: 1000          # give the reported accuracy, seen by no choice; default: all there are
  # selection_images: 1000           # of the images left over, for `clado smallest`; default: all
  seed: 0                            # which images
bits: [2, 4, 8]                      # candidate widths of each layer, ascending within 1..16
# layers:
#   bits: {{"fc.weight": [8]}}         # other candidates for layers by name pattern; a single one pins them
#   ties: [["layer1.*"]]             # groups of layers that must share a bit-width
quantizer:
  weights: mse                       # range of the codes: mse or minmax
  granularity: per_channel           # one scale per_channel or per_tensor
  scheme: symmetric                  # symmetric or affine
criterion: kl_to_float               # what must not grow: kl_to_float, or cross_entropy (needs labels)
estimators: [layerwise, pairwise, gauss_newton]  # compared; the best measured answer is chosen
budgets:
  average_bits: [2.25, 2.5, 3, 3.5, 4, 5]  # per searched weight
  # size_bytes: [100000]             # bytes of the searched weights
  # percent_of_8_bit: [40]           # of the bytes at 8 bits everywhere
  # bops: [4.0e+9]                   # bit operations of one image: MACs x weight bits x 8
# constraints:                       # hold beside every budget; latency and table read a CSV file: layer,bits,UNIT
#   - {{kind: latency, bound: 0.002, path: latency.csv}}
solver:
  name: scip                         # scip proves optimality; greedy and exhaustive (tiny networks) need no package
  time_limit: 60                     # seconds for one budget
cluster:
  kind: local                        # worker processes on this machine
  workers: 2
  threads_per_worker: 1
tracking:
  experiment: clado                  # in MLflow
  # uri: http://localhost:5000       # default: SQLite in the run's folder
# folder: runs/mine                  # where the run is kept; default: named after the settings
"""


def render(network: str | None = None, data: str | None = None) -> str:
    """The YAML for the zoo's demo, or for a factory `package.module:function` and an image folder. Raises ConfigurationError.

    Both arguments or neither: the zoo's images fit the zoo's network only.
    """
    if (network is None) != (data is None):
        given, absent = ("network", "data FOLDER") if data is None else ("data", "network package.module:function")
        raise ConfigurationError(f"--{given} is given without --{absent}; expected both, or neither for the zoo's demo")
    if network is None or data is None:
        text = _TEMPLATE.format(network=_ZOO_NETWORK, data=_ZOO_DATA)
    else:
        # A JSON string is a YAML scalar whatever characters it holds.
        own_network = _FACTORY_NETWORK.format(network=json.dumps(network, ensure_ascii=False))
        text = _TEMPLATE.format(network=own_network, data=_FOLDER_DATA.format(data=json.dumps(data, ensure_ascii=False)))
    parse_config(yaml.safe_load(text), "clado init")
    return text
