"""Settings of a run: YAML and command-line overrides → a frozen, validated `RunConfig`. Imports neither torch nor NumPy."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from clado.bits import check_bits
from clado.errors import ConfigurationError, StoreError
from clado.plugins import PACKAGE, available, nearest

log = logging.getLogger(__name__)

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


def _one_of(folder: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in available(folder):
            raise ValueError(
                f"unknown name {name!r}; expected one of {', '.join(available(folder))}{nearest(name, available(folder))}"
            )
        return name

    return AfterValidator(check)


def _check_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return check_bits(bits)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


Integer = Annotated[int, Field(strict=True)]  # pydantic would take true for 1, and "2" for 2
Count = Annotated[int, Field(strict=True, ge=1)]
Bits = Annotated[tuple[Integer, ...], AfterValidator(_check_bits)]
BitsOrNone = Annotated[tuple[Integer, ...], AfterValidator(lambda bits: _check_bits(bits) if bits else bits)]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_WEIGHTS = frozenset({"hawq", "mpqco", "fisher"})  # estimators that see errors of weights, by gradients
BY_SAMPLE = frozenset({"mpqco", "fisher"})  # those that need the gradient of every single image
ROUNDING = frozenset({"gptq", "adaround"})  # corrections that choose each weight's code: one of them at most


class Settings(BaseModel):
    """Base of every section: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class NetworkSettings(Settings):
    """Which network: of the zoo, of torchvision or timm by name, or what a Python factory `package.module:function` returns."""

    source: Literal["zoo", "torchvision", "timm", "factory"] = "zoo"
    name: str = Field(min_length=1)
    weights: Literal["random"] | UserPath | None = Field(
        default=None, description="safetensors or .pth file with the network's state, or random; default: the source's own"
    )
    weights_name: str | None = Field(
        default=None,
        description="source torchvision: which weights the file holds, such as IMAGENET1K_V1, whose preprocessing is then "
        "data's default; default: known from a published file's name. timm: say it in name, such as resnet50.a1_in1k",
    )
    image_shape: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width; default: the source's own"
    )
    fixed: tuple[str, ...] = Field(default=(), description="name patterns of layers that stay in float")
    split: tuple[str, ...] = Field(
        default=(), description='name patterns of attention weights ("*.in_proj_weight") to search as q, k and v, not as one'
    )
    graph: bool = Field(
        strict=True, default=True, description="false for a network that torch.export refuses: the same numbers, slower"
    )
    numeric: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32", description="arithmetic of the forwards; tf32 and bfloat16 are faster on GPUs, and less exact"
    )
    channels_last: bool | None = Field(
        strict=True,
        default=None,
        description="memory layout of images and weights, which changes rounding alone; default: true on CPUs "
        "with AVX2 alone, and for depthwise convolutions on others: where it takes up to half of the time away",
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
        shipped = zoo_networks()
        if self.source == "zoo" and shipped and self.name not in shipped:
            raise ValueError(
                f"the zoo has no network {self.name!r}; expected one of {', '.join(shipped)}{nearest(self.name, shipped)}, "
                "or another source: torchvision, timm, factory"
            )
        return self


def zoo_networks() -> tuple[str, ...]:
    """Names of the networks whose weights ship."""
    return tuple(sorted(file.stem for file in (PACKAGE / "data" / "zoo").glob("*.safetensors")))


PREPROCESSING = ("resize", "interpolation", "mean", "std")


class DataSettings(Settings):
    """Which images. Slices are disjoint: calibration, sensitivity (measuring), validation (accuracy, seen by no choice)."""

    source: Literal["zoo", "folder", "tar"] = "zoo"
    path: UserPath | None = Field(
        default=None,
        description="source folder: an image folder with one sub-folder a class, or train/ and val/ of such; source tar: a "
        "folder of shards *.tar (KEY.jpg, KEY.cls), or train/ and val/ of such",
    )
    sensitivity_images: Count = 256
    calibration_images: Integer = Field(default=512, ge=0)
    validation_images: Count | None = Field(default=None, description="default: all there are")
    selection_images: Integer | None = Field(
        default=None, ge=1, description="at most so many of the images left over choose a `clado smallest`; default: all"
    )
    sample_blocks: Count = Field(default=16, description="parts of the sensitivity set whose losses are kept apart")
    seed: Integer = Field(default=0, ge=0)
    resize: Count | None = Field(
        default=None, description="shorter side in pixels before the centre crop; default: the weights' own, else the crop's"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = Field(
        default=None, description="of the resize; default: the weights' own, else bilinear"
    )
    mean: tuple[Annotated[float, Field(strict=True)], ...] | None = Field(
        default=None, description="subtracted from pixels in 0..1, per channel; default: the weights' own, else ImageNet's"
    )
    std: tuple[Annotated[float, Field(strict=True, gt=0)], ...] | None = Field(
        default=None, description="divides them; default: the weights' own, else ImageNet's"
    )
    class_balanced: bool = Field(
        strict=True, default=False, description="as many images of each class in every slice whose size is given, to within one"
    )
    class_numbers: Literal["auto", "imagenet", "folders"] = Field(
        default="auto",
        description="imagenet: 0..999 of the synsets that name the classes; folders: in alphabetical order of those that are "
        "there; auto: imagenet where every name is one of the thousand synsets",
    )
    max_corrupt_images: Integer = Field(
        default=0, ge=0, description="so many unreadable images are named and left out; one more, and the run is refused"
    )
    skip: tuple[str, ...] = Field(default=(), description="names below path of images that are left out")

    @model_validator(mode="after")
    def _complete(self) -> "DataSettings":
        if self.source != "zoo" and self.path is None:
            holds = "one sub-folder of images for each class" if self.source == "folder" else "tar shards of KEY.jpg and KEY.cls"
            raise ValueError(f"source {self.source} needs a path; expected path: FOLDER with {holds}")
        if self.source == "zoo":
            for key in ("path", *PREPROCESSING, "class_balanced", "class_numbers", "max_corrupt_images", "skip"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key} is for source folder; the zoo's images come as they are: expected source: folder, or no {key}"
                    )
        if self.sample_blocks > self.sensitivity_images:
            raise ValueError(
                f"{self.sample_blocks} sample_blocks do not fit {self.sensitivity_images} sensitivity_images; "
                f"expected at most one block an image, so sample_blocks: {min(16, self.sensitivity_images)}"
            )
        return self


class QuantizerSettings(Settings):
    """How weights are rounded."""

    weights: Annotated[str, _one_of("quantizers")] = "mse"
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    scheme: Literal["symmetric", "affine"] = "symmetric"


class ActivationSettings(Settings):
    """Whether the input activations of the searched layers are rounded, to which widths, and over which range."""

    bits: BitsOrNone = Field(default=(), description="candidate widths beside the weights'; one: for every layer; none: float")
    range: Annotated[str, _one_of("quantizers")] = Field(
        default="mse", description="how the range of the codes is fitted, on the calibration images"
    )


class AdaroundSettings(Settings):
    """How long the correction `adaround` optimises; read only where it is among the corrections."""

    steps: Count = Field(default=1000, description="optimiser steps for one layer at one bit-width")


Positive = Annotated[float, Field(strict=True, gt=0)]


class BudgetSettings(Settings):
    """What each answer must fit, one answer for each number: average bits per searched weight, bytes of the searched weights,
    percent of their bytes at 8 bits everywhere, or bit operations of one image."""

    average_bits: tuple[Annotated[float, Field(strict=True, gt=0, le=32)], ...] = ()
    size_bytes: tuple[Count, ...] = ()
    percent_of_8_bit: tuple[Positive, ...] = ()
    bops: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _some(self) -> "BudgetSettings":
        kinds = (self.average_bits, self.size_bytes, self.percent_of_8_bit, self.bops)
        if not any(kinds):
            raise ValueError("no budget is given; expected average_bits: [3, 4] or size_bytes: [100000]")
        for budgets in kinds:
            if len(set(budgets)) < len(budgets):
                raise ValueError(f"the budgets {list(budgets)} name one twice; expected each once")
        return self


class ConstraintSettings(Settings):
    """A limit that every answer must meet beside its budget, such as latency from a measured table."""

    kind: Annotated[str, _one_of("constraints")]
    bound: Positive
    path: UserPath | None = Field(
        default=None, description="kinds latency and table: CSV with the columns layer,bits[,activation_bits],UNIT"
    )
    scales: bool = Field(default=False, description="kind size: count scales and zero points as well, four bytes each")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "ConstraintSettings":
        if self.scales and self.kind != "size":
            raise ValueError(f"scales counts bytes; expected with kind size, not {self.kind}")
        if (self.kind in ("latency", "table")) != (self.path is not None):
            raise ValueError(
                f"kind {self.kind} {'needs' if self.path is None else 'takes no'} path: FILE.csv with layer,bits,UNIT"
            )
        return self


class LayerSettings(Settings):
    """Exceptions for layers, by name pattern."""

    bits: dict[str, Bits] = Field(default={}, description="other candidates for these layers; a single one pins them")
    ties: tuple[tuple[str, ...], ...] = Field(default=(), description="groups of layers that must share a bit-width")
    blocks: tuple[tuple[str, ...], ...] = Field(
        default=(), description="blocks of layers for the estimator blockwise; default: those of the module tree"
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # frozen, but for the dict inside


class SolverSettings(Settings):
    """How the integer program is solved."""

    name: Annotated[str, _one_of("solvers")] = "scip"
    time_limit: float = Field(strict=True, default=60.0, gt=0, description="seconds for one budget")


class SearchSettings(Settings):
    """Local search on the measured loss around the best candidate of each budget."""

    evaluations: Integer = Field(default=8, ge=0, description="losses measured for one budget at most; 0: no search")
    batch: Count = Field(default=4, description="of them measured at a time: fewer learn faster, more keep more workers busy")


class MeasureSettings(Settings):
    """How measuring is cut into work, which changes no number beyond rounding; and how probes treat batch norm."""

    batch_images: Count | None = Field(
        default=None, description="images pushed through the network at once; default: as many as the processor's cache holds"
    )
    memory_limit_mb: Integer | None = Field(
        default=None, ge=16, description="MB (10^6) that measuring may take a worker; default: a share of what is free"
    )
    batch_statistics: bool = Field(
        strict=True, default=False, description="probes with batch norm on the statistics of their own images; changes numbers"
    )


class GradientSettings(Settings):
    """What the estimators hawq, mpqco and fisher draw at random; changes their numbers."""

    vectors: Count = Field(default=8, description="random vectors of hawq's trace in each sample block, a backward pass each")
    seed: Integer = Field(default=0, ge=0, description="of hawq's vectors, and of the labels that kl_to_float draws")


def _cluster(name: str) -> str:
    folder = PACKAGE.parent / "flows" / "clusters"
    valid = tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))
    if name not in valid:
        raise ValueError(f"unknown name {name!r}; expected one of {', '.join(valid)}{nearest(name, valid)}")
    return name


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} cannot be used; expected {expected}")
        return text

    return AfterValidator(check)


Address = Annotated[str, _matching(r"(tcp|tls)://[^\s/]+:\d+", "tcp://HOST:PORT or tls://HOST:PORT")]
Name = Annotated[str, _matching(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", "lower-case letters, digits and hyphens")]
Word = Annotated[str, _matching(r"[\w./:@%+=,-]+", "one word of letters, digits and . / : @ % + = , -")]  # goes into a shell


class TlsSettings(Settings):
    """Certificates of Dask's connections, PEM files at the same path on every machine; `clado certificates` makes some."""

    ca_file: UserPath
    cert: UserPath
    key: UserPath


class SshSettings(Settings):
    """Machines that workers are started on; the first one holds the scheduler too."""

    hosts: tuple[Word, ...]
    user: Word | None = Field(default=None, description="default: as ~/.ssh/config says, or your own name")
    port: Count | None = None
    key_file: Path | None = Field(default=None, description="private key; default: the agent's and those of ~/.ssh")
    known_hosts: Path | None = Field(default=None, description="keys of the hosts; default: ~/.ssh/known_hosts")
    python: Word | None = Field(default=None, description="interpreter on the hosts that has clado; default: this one's path")
    gpus_per_host: Count | None = Field(default=None, description="GPUs of each host, one to a worker; default: none are pinned")
    interface: Word | None = Field(default=None, description="network interface of the hosts, such as ib0")


class SlurmSettings(Settings):
    """A batch job for each worker."""

    memory: Annotated[str, _matching(r"\d+(\.\d+)?([kKMGT]i?)?B?", "an amount of memory, such as 16GB")] = Field(
        description="of one job, such as 16GB"
    )
    partition: Word | None = None
    account: Word | None = None
    walltime: Word = Field(default="04:00:00", description="of one job; a job that ends is submitted again")
    gpus: Integer = Field(default=0, ge=0, description="GPUs of one job")
    interface: Word | None = Field(default=None, description="network interface between the nodes, such as ib0")
    python: Word | None = Field(default=None, description="interpreter on the nodes that has clado; default: this one's path")
    directives: tuple[str, ...] = Field(default=(), description="more options of sbatch, such as --constraint=a100")
    prologue: tuple[str, ...] = Field(default=(), description="shell lines before the worker starts, such as module load cuda")
    log_folder: UserPath | None = Field(default=None, description="what jobs print; default: where they were submitted")


class ClaimSettings(Settings):
    """A persistent volume claim, mounted in every pod."""

    name: Name
    path: Path


class KubernetesSettings(Settings):
    """Pods that the Dask operator starts; its custom resources must be installed."""

    image: str = Field(min_length=1, description="container image that has clado")
    name: Name = "clado"
    namespace: Name = "default"
    cpus: Positive = Field(default=1.0, description="of one worker")
    memory: Word = Field(default="4Gi", description="of one worker")
    gpus: Integer = Field(default=0, ge=0, description="of one worker")
    claims: tuple[ClaimSettings, ...] = Field(default=(), description="volumes, such as that of the runs, at the flow's own path")
    secret: Name | None = Field(default=None, description="Kubernetes secret that becomes environment variables of the pods")


class ClusterSettings(Settings):
    """Where tiles are computed. Sections of other kinds than `kind` are kept and not used: changing one word moves a run."""

    kind: Annotated[str, AfterValidator(_cluster)] = "local"
    workers: Count = Field(default=2, description="worker processes; kind address: how many to expect")
    threads_per_worker: Count = Field(default=1, description="torch threads of one worker")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: the GPU that a process sees, if any")
    share_gpus: bool = Field(strict=True, default=False, description="kind local_gpus: more workers than GPUs may share them")
    start_timeout: Positive = Field(default=300.0, description="seconds without any worker until the run ends")
    address: Address | None = Field(default=None, description="kind address: the scheduler, tcp://HOST:PORT or tls://HOST:PORT")
    tls: TlsSettings | None = Field(default=None, description="encrypts Dask's connections and admits only these certificates")
    ssh: SshSettings | None = None
    slurm: SlurmSettings | None = None
    kubernetes: KubernetesSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ClusterSettings":
        examples = {
            "address": "tcp://127.0.0.1:8786",
            "ssh": "{hosts: [node1, node2]}",
            "slurm": "{memory: 16GB}",
            "kubernetes": "{image: registry/clado:0.1.0}",
        }
        if self.kind in examples and getattr(self, self.kind) is None:
            raise ValueError(f"kind {self.kind} needs {self.kind}; expected for example {self.kind}: {examples[self.kind]}")
        if self.kind == "address" and str(self.address).startswith("tls") != (self.tls is not None):
            raise ValueError(
                f"address {self.address} {'needs' if self.tls is None else 'takes no'} tls; expected tls://… together with "
                "tls: {ca_file: ca.pem, cert: cert.pem, key: key.pem}, or tcp://… without"
            )
        if self.kind == "kubernetes" and self.tls is not None:
            raise ValueError(
                "kind kubernetes takes no tls: the Dask operator speaks to its scheduler in the clear; restrict the pods' "
                "network, or start the pods yourself and use kind address"
            )
        if self.kind == "ssh" and self.ssh is not None and not 1 <= len(self.ssh.hosts) <= self.workers:
            raise ValueError(
                f"{self.workers} workers cannot be dealt out to {len(self.ssh.hosts)} hosts; expected one a host or more"
            )
        return self


HIDDEN = "***"  # in place of a credential
_USER = re.compile(r"(?<=://)(?:[^/\s:@]*:\S*|[^/\s:@]+)@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|sig|credential|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with the user, the password and the secret query values of any URI in it replaced by ***."""
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


# whatever writes settings down (config.yaml, MLflow, Prefect) writes JSON, and gets no credentials
Uri = Annotated[str, PlainSerializer(redact, when_used="json")]


def tracking_uri(given: str | None = None) -> str:
    """The URI given, else MLFLOW_TRACKING_URI, else MLflow's own default. A relative path becomes absolute."""
    uri = given or os.environ.get(TRACKING_VARIABLE) or "sqlite:///mlflow.db"
    return re.sub("^(sqlite:///|file:)(?!/|:memory:)(.+)", lambda found: found[1] + Path(found[2]).resolve().as_posix(), uri)


def database_of(uri: str) -> Path | None:
    """The file of an SQLite tracker, None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _kept_uri(given: str) -> str:
    if "?" in str(Path.cwd()) and not (given or os.environ.get(TRACKING_VARIABLE)):
        raise ValueError(f"{Path.cwd()} has a ?, which ends the name of MLflow's database; expected another folder, or a URI")
    return tracking_uri(given) if given else redact(tracking_uri())  # the environment keeps its credentials


class TrackingSettings(Settings):
    """Where MLflow records the run."""

    experiment: str = "clado"
    uri: Annotated[Uri, AfterValidator(_kept_uri)] = Field(
        default="",
        validate_default=True,
        description="default: MLFLOW_TRACKING_URI of the environment, else sqlite:///mlflow.db in the working folder",
    )
    models: bool = Field(
        strict=True, default=True, description="log the chosen networks and register them; false for a server of MLflow 2"
    )


def _bucket(url: str) -> str:
    expected = "expected s3://BUCKET/PREFIX, with the keys in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    if redact(url) != url:
        raise ValueError(f"{redact(url)} has credentials, and is written down with every run; {expected}")
    if not re.fullmatch(r"s3://[\w.-]+/[\w.=/-]*\w", url):
        raise ValueError(f"{url!r} is no place for a store; {expected}")
    return url


class RunConfig(Settings):
    """All settings of a run; everything but the network has a default."""

    network: NetworkSettings
    data: DataSettings = DataSettings()
    bits: Bits = (2, 4, 8)
    layers: LayerSettings = LayerSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    activations: ActivationSettings = ActivationSettings()
    corrections: tuple[Annotated[str, _one_of("corrections")], ...] = (
        "equalization",
        "gptq",
        "output_statistics",
        "batchnorm_reestimation",
    )
    adaround: AdaroundSettings = AdaroundSettings()
    criterion: Literal["kl_to_float", "cross_entropy"] = "kl_to_float"
    # what the study ends with (docs/where-interactions-help.md): 3 to 6 % of pairwise's forwards, the search included
    estimators: tuple[Annotated[str, _one_of("estimators")], ...] = ("layerwise", "gauss_newton")
    budgets: BudgetSettings = BudgetSettings(average_bits=(2.25, 2.5, 3, 3.5, 4, 5))
    constraints: tuple[ConstraintSettings, ...] = ()
    solver: SolverSettings = SolverSettings()
    search: SearchSettings = SearchSettings()
    measure: MeasureSettings = MeasureSettings()
    gradients: GradientSettings = GradientSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    store: Annotated[Uri, AfterValidator(_bucket)] | None = Field(
        default=None, description="a bucket for what is measured, s3://BUCKET/PREFIX; default: store.zarr in the run's folder"
    )
    folder: UserPath | None = Field(
        default=None, description="where the run is kept; default: runs/NETWORK-HASH of the settings that shape it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not self.estimators:
            raise ValueError(f"estimators is empty; expected one or more of {', '.join(available('estimators'))}")
        if len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators {list(self.estimators)} names one twice")
        blind = [name for name in self.estimators if name in OF_WEIGHTS]
        if blind and len(self.activations.bits) > 1:
            raise ValueError(
                f"estimator {blind[0]} sees errors of weights only, so that of activations.bits {list(self.activations.bits)} "
                "the narrowest would look as good as the widest; expected one width, none, or other estimators"
            )
        by_sample = [name for name in self.estimators if name in BY_SAMPLE]
        if by_sample and self.measure.batch_statistics:
            raise ValueError(
                f"estimator {by_sample[0]} needs the gradient of every single image, which measure.batch_statistics mixes; "
                "expected batch_statistics: false, or other estimators"
            )
        if len(set(self.corrections)) < len(self.corrections):
            raise ValueError(f"corrections {list(self.corrections)} names one twice")
        if set(self.corrections) >= ROUNDING:
            raise ValueError(
                f"corrections names both {' and '.join(sorted(ROUNDING, reverse=True))}; expected one way of rounding"
            )
        if not self.data.calibration_images and (self.activations.bits or self.corrections):
            calibrated = "activations.bits" if self.activations.bits else f"the correction {self.corrections[0]}"
            raise ValueError(f"{calibrated} needs calibration images; expected data.calibration_images: 256 or more")
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
        # what is off is left out, so that a folder keeps its name when such a setting is added
        for key in ("numeric", "channels_last", "split", "weights_name"):
            if getattr(self.network, key) == NetworkSettings.model_fields[key].default:
                document["network"].pop(key)
        for key in ("interpolation", "class_balanced", "class_numbers"):
            if getattr(self.data, key) == DataSettings.model_fields[key].default:
                document["data"].pop(key)
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
        """Where the run is kept: `folder`, or a name made of the network's and a hash of the measured settings."""
        name = self.network.name.replace(":", ".").replace("/", ".")
        return self.folder or Path("runs") / f"{name}-{fingerprint(self.measured_settings())[:8]}"

    def to_yaml(self) -> str:
        """The settings as YAML, defaults written out."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=120
        )


def fingerprint(document: Any) -> str:
    """SHA-256 of the canonical JSON of plain data: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML without its silent choice of the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [pair for pair in node.value if pair[0].tag != MERGE]  # what << brings may be given anew
        keys = [self.construct_object(key, deep=True) for key, _ in own]
        for k, key in enumerate(keys):
            if key in keys[:k]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", own[k][0].start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with overrides of the form `section.key=value` (values in YAML) on top."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigurationError(f"{path} {what}; expected a YAML file, such as `clado init` writes")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path} holds no settings; expected YAML such as `clado init` writes, beginning with network:")
    # A section whose keys are all commented out is the section of defaults.
    document = {key: value for key, value in document.items() if value is not None}
    for override in overrides:
        _apply(document, override)
    return parse_config(document, str(path))


def load_run_config(folder: Path, uri: str | None = None) -> RunConfig:
    """The configuration of a run's folder, wherever that is now.

    The URI of MLflow is the one given here, else MLFLOW_TRACKING_URI, else the one that the run has kept. Where that is an SQLite
    file whose folder is gone, it is the default, with a warning.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise StoreError(
            f"{folder} is not the folder of a run: it has no config.yaml; expected such as `clado run` makes under runs/"
        )
    overrides = [f"folder={json.dumps(str(folder), ensure_ascii=False)}"]
    kept = load_config(file, overrides)
    database, chosen = database_of(kept.tracking.uri), uri or os.environ.get(TRACKING_VARIABLE)
    gone = database is not None and not database.parent.is_dir()
    if not chosen and not gone:
        return kept
    config = load_config(file, [*overrides, f"tracking.uri={json.dumps(uri or '')}"])
    if not chosen:
        log.warning("%s is gone; MLflow's records of %s go to %s", kept.tracking.uri, folder, config.tracking.uri)
    return config


def parse_config(document: dict[str, Any], whence: str = "configuration") -> RunConfig:
    """A validated configuration from plain data; each fault becomes one line of one ConfigurationError."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors()]
        raise ConfigurationError(redact(f"{whence}: " + "\n  ".join(lines))) from None


def parse_limit(text: str) -> ConstraintSettings:
    """KIND=BOUND or KIND=BOUND:CSV, such as a command line takes."""
    kind, _, rest = text.partition("=")
    bound, _, path = rest.partition(":")
    expected = "expected KIND=BOUND or KIND=BOUND:CSV, such as bops=4e9 or latency=0.002:times.csv"
    try:
        return ConstraintSettings(kind=kind, bound=float(bound), path=Path(path) if path else None)
    except ValidationError as error:
        raise ConfigurationError(f"--limit {text!r}: {'; '.join(map(_explain, error.errors()))}; {expected}") from None
    except ValueError:
        raise ConfigurationError(f"--limit {text!r} has no number as its bound; {expected}") from None


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"override {override!r} is not KEY=VALUE; expected for example data.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the value of override {override!r} is not YAML: {error}") from None
    *path, last = key.split(".")
    section: Any = document
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigurationError(f"override {override!r}: {name!r} is a value, not a section")
    section[last] = value


def _explain(fault: Any) -> str:
    *path, key = fault["loc"] or ("",)
    where, given = ".".join(str(part) for part in fault["loc"]), fault["input"]
    plain = isinstance(given, str | int | float | bool | list | tuple)
    shown = repr(given) if plain else "empty" if given is None else type(given).__name__
    match fault["type"]:
        case "extra_forbidden":
            valid = _keys_at(path)
            said = f"unknown key {where!r}{nearest(str(key), valid)}; valid keys are {', '.join(valid)}"
        case "missing" if isinstance(key, int):
            parent = ".".join(str(part) for part in path)
            said = f"{parent} is too short; expected {key + 1} values or more, such as [3, 224, 224]"
        case "missing":
            example = "; expected for example network: {source: zoo, name: resnet20_fashion_mnist}"
            said = f"{where!r} is missing{example if 'network' in (key, *path) else ', and has no default'}"
        case "literal_error":
            valid = tuple(re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
            said = f"{where}: unknown name {shown}; expected one of {', '.join(valid)}{nearest(str(given), valid)}"
        case "tuple_type":
            said = f"{where} is {shown}; expected a list, such as [{given if plain else 2}]"
        case "model_type" | "model_attributes_type":
            said = f"{where} is {shown}; expected a section with keys of {', '.join(_keys_at(fault['loc']))}"
        case "value_error":
            message = str(fault["msg"]).removeprefix("Value error, ")
            said = message if not where or message.startswith(f"{where} ") else f"{where}: {message}"
        case "float_type" if isinstance(given, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\d+", given):
            said = f"{where} is the text {shown} to YAML; expected a point and a sign, such as {float(given):.1e}"
        case _:
            said = f"{where}: {fault['msg']}, got {shown}"
    return said


def _keys_at(path: Sequence[Any]) -> tuple[str, ...]:
    model: type[BaseModel] = RunConfig
    for name in path:
        annotation = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return ()
        model = inner[0]
    return tuple(model.model_fields)
