"""Settings of a run: a frozen, validated `RunConfig`. Imports neither torch nor NumPy, and no plug-in.

Settings that depend on a plug-in are checked when the run is opened (`clado.run.plugin_checks`).
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from clado.plugins import PACKAGE, available, nearest
from clado.settings.cluster import ClusterSettings
from clado.settings.fields import Bits, BitsOrNone, Count, Integer, Positive, Settings, UserPath, dotted, one_of
from clado.settings.identity import fingerprint
from clado.settings.redaction import Uri, redact
from clado.settings.tracking import TrackingSettings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class NetworkSettings(Settings):
    """Which network: of the zoo, of torchvision or timm by name, or what a Python factory `package.module:function` returns."""

    source: Literal["zoo", "torchvision", "timm", "factory"] = "zoo"
    name: str = Field(min_length=1)
    weights: Literal["random"] | UserPath | None = Field(
        default=None,
        description="safetensors or .pth file with the network's state, or random; default: the weights of the source",
    )
    weights_name: str | None = Field(
        default=None,
        description="source torchvision: which weights the file holds, such as IMAGENET1K_V1, whose preprocessing is then "
        "data's default; default: known from a published file's name. timm: say it in name, such as resnet50.a1_in1k",
    )
    image_shape: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width; default: from the source"
    )
    fixed: tuple[str, ...] = Field(default=(), description="name patterns of layers that stay in float")
    split: tuple[str, ...] = Field(
        default=(), description='name patterns of attention weights ("*.in_proj_weight") to search as q, k and v, not as one'
    )
    graph: bool = Field(
        strict=True, default=True, description="false for a network that torch.export refuses: the same numbers, slower"
    )
    numeric: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32", description="arithmetic of forward passes; tf32 and bfloat16 are faster on GPUs, and less exact"
    )
    channels_last: bool | None = Field(
        strict=True,
        default=None,
        description="memory layout of images and weights, which changes only rounding; default: true where it is "
        "faster: on CPUs with AVX2 but not AVX-512, and on all CPUs for networks with depthwise convolutions",
    )

    @model_validator(mode="after")
    def _name_fits_source(self) -> "NetworkSettings":
        if self.source == "factory" and ":" not in self.name:
            raise ValueError(
                f"name {self.name!r} is not package.module:function; a factory is a function that returns a torch.nn.Module"
            )
        if self.source in ("torchvision", "timm") and self.weights is None:
            raise ValueError(
                f"source {self.source} needs weights: a safetensors file of the network's state_dict (nothing is downloaded), "
                "or random for an untrained network"
            )
        if self.weights_name is not None and self.source != "torchvision":
            raise ValueError(
                f"weights_name is for source torchvision; expected none with source {self.source}"
                + (", and the weights' tag in name, such as resnet50.a1_in1k" if self.source == "timm" else "")
            )
        names = zoo_networks()
        if self.source == "zoo" and names and self.name not in names:
            raise ValueError(
                f"the zoo has no network {self.name!r}; expected one of {', '.join(names)}{nearest(self.name, names)}, "
                "or another source: torchvision, timm, factory"
            )
        return self


def zoo_networks() -> tuple[str, ...]:
    """Names of the networks whose weights ship."""
    return tuple(sorted(file.stem for file in (PACKAGE / "data" / "zoo").glob("*.safetensors")))


PREPROCESSING = ("resize", "interpolation", "mean", "std")


class DataSettings(Settings):
    """Which images. Slices are disjoint: calibration, sensitivity (measuring), validation (accuracy, seen by no choice)."""

    source: Literal["zoo", "folder", "tar", "factory"] = "zoo"
    factory: Annotated[str, dotted("of a function")] | None = Field(
        default=None,
        description="source factory: package.module:function that returns (images, targets), or a dictionary train and val of "
        "such; targets have any type and shape (N, ...)",
    )
    path: UserPath | None = Field(
        default=None,
        description="source folder: an image folder with one sub-folder a class, or train/ and val/ of such; source tar: a "
        "folder of shards *.tar (KEY.jpg, KEY.cls), or train/ and val/ of such",
    )
    sensitivity_images: Count = Field(
        default=256, description="the matrix is measured on the first half; the second half decides between proposals"
    )
    calibration_images: Integer = Field(default=512, ge=0)
    validation_images: Count | None = Field(default=None, description="default: all")
    selection_images: Integer | None = Field(
        default=None, ge=1, description="most of the remaining images for `clado smallest`; default: all"
    )
    sample_blocks: Count = Field(default=16, description="parts of the sensitivity set with separate losses, for standard errors")
    seed: Integer = Field(default=0, ge=0)
    resize: Count | None = Field(
        default=None, description="shorter side in pixels before the centre crop; default: that of the weights, else of the crop"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = Field(
        default=None, description="interpolation of the resize; default: that of the weights, else bilinear"
    )
    mean: tuple[Annotated[float, Field(strict=True)], ...] | None = Field(
        default=None, description="subtracted from pixels in 0..1, per channel; default: that of the weights, else ImageNet's"
    )
    std: tuple[Annotated[float, Field(strict=True, gt=0)], ...] | None = Field(
        default=None, description="then divides them; default: that of the weights, else ImageNet's"
    )
    class_balanced: bool = Field(
        strict=True, default=False, description="equally many images of each class, up to one, in every set whose size is given"
    )
    class_numbers: Literal["auto", "imagenet", "folders"] = Field(
        default="auto",
        description="imagenet: 0..999 of the synsets that name the classes; folders: in alphabetical order of those that are "
        "there; auto: imagenet where every name is one of the thousand synsets",
    )
    max_corrupt_images: Integer = Field(
        default=0, ge=0, description="most unreadable images; they are named and left out, and with one more the run is refused"
    )
    skip: tuple[str, ...] = Field(default=(), description="names (below path) of images to leave out")

    @model_validator(mode="after")
    def _complete(self) -> "DataSettings":
        if (self.source == "factory") != (self.factory is not None):
            raise ValueError(
                f"source {self.source} {'needs a' if self.factory is None else 'takes no'} factory; expected source: factory "
                "with factory: package.module:function, or another source without it"
            )
        if self.source in ("folder", "tar") and self.path is None:
            holds = "one sub-folder of images for each class" if self.source == "folder" else "tar shards of KEY.jpg and KEY.cls"
            raise ValueError(f"source {self.source} needs a path; expected path: FOLDER with {holds}")
        if self.source in ("zoo", "factory"):
            owner = "the zoo's images" if self.source == "zoo" else "a factory's images"
            for key in ("path", *PREPROCESSING, "class_balanced", "class_numbers", "max_corrupt_images", "skip"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key} is for source folder; {owner} cannot be changed: expected source: folder, or no {key}"
                    )
        if self.sample_blocks > self.sensitivity_images:
            raise ValueError(
                f"{self.sample_blocks} sample_blocks do not fit {self.sensitivity_images} sensitivity_images; "
                f"expected at most one block an image, so sample_blocks: {min(16, self.sensitivity_images)}"
            )
        return self


class QuantizerSettings(Settings):
    """How weights are rounded."""

    weights: Annotated[str, one_of("quantizers")] = "mse"
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    scheme: Literal["symmetric", "affine"] = "symmetric"


class ActivationSettings(Settings):
    """Whether the input activations of the searched layers are rounded, to which widths, and over which range."""

    bits: BitsOrNone = Field(
        default=(), description="candidate widths of inputs; a single one is used for every layer; none: float"
    )
    range: Annotated[str, one_of("quantizers")] = Field(
        default="mse", description="how the range of the codes is fitted to the calibration images"
    )


class AdaroundSettings(Settings):
    """How long the correction `adaround` optimises; read only where it is among the corrections."""

    steps: Count = Field(default=1000, description="optimiser steps for one layer at one bit-width")


class BudgetSettings(Settings):
    """The budgets. Each number gives one answer.

    The numbers are average bits per searched weight, bytes of the searched weights, percent of their bytes at 8 bits
    everywhere, bit operations of one image, or seconds of one image in the runtime.
    """

    average_bits: tuple[Annotated[float, Field(strict=True, gt=0, le=32)], ...] = ()
    size_bytes: tuple[Count, ...] = ()
    percent_of_8_bit: tuple[Positive, ...] = ()
    bops: tuple[Positive, ...] = ()
    latency: tuple[Positive, ...] = Field(default=(), description="seconds of one image, by the table of `clado profile`")

    @model_validator(mode="after")
    def _some(self) -> "BudgetSettings":
        bounds = (self.average_bits, self.size_bytes, self.percent_of_8_bit, self.bops, self.latency)
        if not any(bounds):
            raise ValueError("no budget is given; expected average_bits: [3, 4] or size_bytes: [100000]")
        for budgets in bounds:
            if len(set(budgets)) < len(budgets):
                raise ValueError(f"the budgets {list(budgets)} name one twice; expected each once")
        return self


class ConstraintSettings(Settings):
    """A limit that every answer must meet in addition to its budget, such as latency from a measured table."""

    name: Annotated[str, one_of("constraints")] = Field(alias="kind")
    bound: Positive
    path: UserPath | None = Field(
        default=None, description="kinds latency and table: CSV with the columns layer,bits[,activation_bits],UNIT"
    )
    scales: bool = Field(default=False, description="kind size: count scales and zero points as well, four bytes each")


class LayerSettings(Settings):
    """Exceptions for layers, by name pattern."""

    bits: dict[str, Bits] = Field(
        default={}, description="other candidates for these layers, such as [8, float]; a single one pins them"
    )
    ties: tuple[tuple[str, ...], ...] = Field(default=(), description="groups of layers that must share a bit-width")
    blocks: tuple[tuple[str, ...], ...] = Field(
        default=(), description="blocks of layers for the estimator blockwise; default: those of the module tree"
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # frozen, except the dict inside


class RuntimeSettings(Settings):
    """The runtime that runs the chosen networks. Their time and accuracy are measured in it."""

    name: Annotated[str, one_of("runtimes")] = "onnxruntime"
    threads: Count = 1
    candidates: Literal["all", "native"] = Field(
        default="all", description="native: only candidates that the runtime has kernels for; a layer without any stays in float"
    )
    images: Count | None = Field(default=None, description="most validation images to count accuracy on; default: all")
    table: UserPath | None = Field(
        default=None,
        description="CSV of `clado profile`, which budgets.latency reads; default: profile/NAME.csv in the run's folder",
    )


class SolverSettings(Settings):
    """How the integer program is solved."""

    name: Annotated[str, one_of("solvers")] = "scip"
    time_limit: float = Field(strict=True, default=60.0, gt=0, description="seconds for one budget")


class SearchSettings(Settings):
    """Local search on the measured loss around the best proposal of each budget."""

    evaluations: Integer = Field(default=0, ge=0, description="most losses that are measured for one budget; 0: no search")
    batch: Count = Field(default=4, description="losses measured at a time; more of them keep more workers busy")


class MeasureSettings(Settings):
    """How measuring is split into work (this changes numbers only by rounding), and how probes treat batch norm."""

    batch_images: Count | None = Field(
        default=None, description="images of one forward pass; default: as many as the processor's cache holds"
    )
    memory_limit_mb: Integer | None = Field(
        default=None, ge=16, description="most MB (10^6) of measuring in a worker; default: a share of the free memory"
    )
    batch_statistics: bool = Field(
        strict=True,
        default=False,
        description="probes use batch norm with the statistics of their own images; this changes numbers",
    )


class GradientSettings(Settings):
    """Random numbers of the estimators hawq, mpqco and fisher. They change the estimates."""

    vectors: Count = Field(
        default=8, description="random vectors of hawq's trace in each sample block; each takes a backward pass"
    )
    seed: Integer = Field(default=0, ge=0, description="seed of hawq's vectors, and of the labels that kl_to_float draws")


def _bucket(url: str) -> str:
    expected = "expected s3://BUCKET/PREFIX, with the keys in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    if redact(url) != url:
        raise ValueError(f"{redact(url)} has credentials, and would be stored with every run; {expected}")
    if not re.fullmatch(r"s3://[\w.-]+/[\w.=/-]*\w", url):
        raise ValueError(f"{url!r} is not a place for a store; {expected}")
    return url


class RunConfig(Settings):
    """All settings of a run. Everything except the network has a default."""

    network: NetworkSettings
    data: DataSettings = DataSettings()
    bits: Bits = (2, 4, 8)
    layers: LayerSettings = LayerSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    activations: ActivationSettings = ActivationSettings()
    corrections: tuple[Annotated[str, one_of("corrections")], ...] = (
        "equalization",
        "gptq",
        "output_statistics",
        "batchnorm_reestimation",
    )
    adaround: AdaroundSettings = AdaroundSettings()
    effort: Literal["fast", "balanced", "best"] = Field(
        default="fast", description="balanced, best: also reconstructs the best answers of each budget; takes longer"
    )
    criterion: Annotated[str, one_of("criteria")] = "kl_to_float"
    metric: Annotated[str, dotted("of a callable (outputs, targets) -> a number for each image")] | None = Field(
        default=None,
        description="package.module:name of a callable (outputs, targets) -> a number for each image, where more is better; "
        "reported in addition to the loss",
    )
    # what the study ends with (docs/where-interactions-help.md): 3 to 6 % of pairwise's forwards, the search included
    estimators: tuple[Annotated[str, one_of("estimators")], ...] = ("layerwise", "gauss_newton")
    budgets: BudgetSettings = BudgetSettings(average_bits=(2.25, 2.5, 3, 3.5, 4, 5))
    constraints: tuple[ConstraintSettings, ...] = ()
    runtime: RuntimeSettings | None = None
    solver: SolverSettings = SolverSettings()
    search: SearchSettings = SearchSettings()
    measure: MeasureSettings = MeasureSettings()
    gradients: GradientSettings = GradientSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    store: Annotated[Uri, AfterValidator(_bucket)] | None = Field(
        default=None, description="a bucket for measurements, s3://BUCKET/PREFIX; default: store.zarr in the run's folder"
    )
    folder: UserPath | None = Field(
        default=None, description="folder of the run; default: runs/NETWORK-HASH, with a hash of the settings"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not self.estimators:
            raise ValueError(f"estimators is empty; expected one or more of {', '.join(available('estimators'))}")
        if len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators {list(self.estimators)} names one twice")
        if len(set(self.corrections)) < len(self.corrections):
            raise ValueError(f"corrections {list(self.corrections)} names one twice")
        readers = [f"the correction {name}" for name in self.corrections[:1]]
        readers += [] if self.effort == "fast" else [f"effort: {self.effort}"]
        if not self.data.calibration_images and (self.activations.bits or readers):
            calibrated = "activations.bits" if self.activations.bits else readers[0]
            raise ValueError(f"{calibrated} needs calibration images; expected data.calibration_images: 256 or more")
        if self.budgets.latency and self.runtime is None:
            raise ValueError(
                "budgets.latency needs a runtime; expected runtime: {name: onnxruntime}, and the table of layer times "
                "that `clado profile` writes"
            )
        if self.data.source == "zoo" and self.network.source != "zoo":
            raise ValueError(
                "the zoo's images are Fashion-MNIST, for the zoo's networks; expected data: {source: folder, path: FOLDER}"
            )
        return self

    def measured_settings(self) -> dict[str, Any]:
        """The settings that a measured number depends on: not budgets, estimators, solver, cluster and tracking."""
        document = self.model_dump(mode="json", include={"network", "data", "bits", "quantizer", "criterion"})
        for unmeasured in ("validation_images", "selection_images", "max_corrupt_images", "skip"):
            document["data"].pop(unmeasured)
        document["data"]["mean"] = self.data.mean or IMAGENET_MEAN
        document["data"]["std"] = self.data.std or IMAGENET_STD
        document["layer_bits"] = {pattern: list(bits) for pattern, bits in self.layers.bits.items()}
        # settings that are off are left out, so that a folder keeps its name when such a setting is added
        for key in ("numeric", "channels_last", "split", "weights_name"):
            if getattr(self.network, key) == NetworkSettings.model_fields[key].default:
                document["network"].pop(key)
        for key in ("interpolation", "class_balanced", "class_numbers", "factory"):
            if getattr(self.data, key) == DataSettings.model_fields[key].default:
                document["data"].pop(key)
        if self.runtime is not None and self.runtime.candidates != "all":
            document["candidates"] = [self.runtime.candidates, self.runtime.name]
        if self.measure.batch_statistics:
            document["batch_statistics"] = True
        if self.activations.bits:
            document["activations"] = self.activations.model_dump(mode="json")
        if self.corrections:
            document["corrections"] = list(self.corrections)
        if "adaround" in self.corrections:
            document["adaround"] = self.adaround.model_dump(mode="json")
        return document

    @property
    def run_folder(self) -> Path:
        """The folder of the run: `folder`, or a name from the network's name and a hash of the measured settings."""
        name = self.network.name.replace(":", ".").replace("/", ".")
        return self.folder or Path("runs") / f"{name}-{fingerprint(self.measured_settings())[:8]}"

    def to_yaml(self) -> str:
        """The settings as YAML, with all defaults."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=120
        )
