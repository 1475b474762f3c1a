"""Settings of a run: YAML and command-line overrides → a frozen, validated `RunConfig`. Imports neither torch nor NumPy."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from clado.errors import ConfigurationError
from clado.plugins import PACKAGE, available, nearest
from clado.space import check_bits


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


class Settings(BaseModel):
    """Base of every section: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NetworkSettings(Settings):
    """Which network: of the zoo, of torchvision or timm by name, or what a Python factory `package.module:function` returns."""

    source: Literal["zoo", "torchvision", "timm", "factory"] = "zoo"
    name: str = Field(min_length=1)
    weights: Literal["random"] | Path | None = Field(
        default=None, description="safetensors file with the network's state, or random; default: the source's own"
    )
    image_shape: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width; default: the source's own"
    )
    fixed: tuple[str, ...] = Field(default=(), description="name patterns of layers that stay in float")
    graph: bool = Field(
        strict=True, default=True, description="false for a network that torch.export refuses: the same numbers, slower"
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
        shipped = zoo_networks()
        if self.source == "zoo" and shipped and self.name not in shipped:
            raise ValueError(
                f"the zoo has no network {self.name!r}; expected one of {', '.join(shipped)}{nearest(self.name, shipped)}, "
                "or another source: torchvision, timm, factory"
            )
        return self


def zoo_networks() -> tuple[str, ...]:
    """Names of the networks whose weights ship."""
    return tuple(sorted(file.stem for file in (PACKAGE / "zoo").glob("*.safetensors")))


class DataSettings(Settings):
    """Which images. Slices are disjoint: calibration, sensitivity (measuring), validation (accuracy, seen by no choice)."""

    source: Literal["zoo", "folder"] = "zoo"
    path: Path | None = Field(
        default=None, description="source folder: an image folder with one sub-folder a class, or train/ and val/ of such"
    )
    sensitivity_images: Count = 256
    calibration_images: Integer = Field(default=256, ge=0)
    validation_images: Count | None = Field(default=None, description="default: all there are")
    selection_images: Integer | None = Field(
        default=None, ge=1, description="at most so many of the images left over choose a `clado smallest`; default: all"
    )
    sample_blocks: Count = Field(default=16, description="parts of the sensitivity set whose losses are kept apart")
    seed: Integer = Field(default=0, ge=0)
    resize: Count | None = Field(
        default=None, description="source folder: shorter side in pixels before the centre crop; default: the crop's"
    )
    mean: tuple[Annotated[float, Field(strict=True)], ...] = Field(
        default=(0.485, 0.456, 0.406), description="source folder: subtracted from pixels in 0..1, per channel"
    )
    std: tuple[Annotated[float, Field(strict=True, gt=0)], ...] = Field(
        default=(0.229, 0.224, 0.225), description="source folder: divides them"
    )

    @model_validator(mode="after")
    def _complete(self) -> "DataSettings":
        if self.source == "folder" and self.path is None:
            raise ValueError("source folder needs a path; expected path: FOLDER with one sub-folder of images for each class")
        if self.source == "zoo":
            for key in ("path", "resize", "mean", "std"):
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
    path: Path | None = Field(default=None, description="kinds latency and table: CSV with the columns layer,bits,UNIT")
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

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # frozen, but for the dict inside


class SolverSettings(Settings):
    """How the integer program is solved."""

    name: Annotated[str, _one_of("solvers")] = "scip"
    time_limit: float = Field(strict=True, default=60.0, gt=0, description="seconds for one budget")


class MeasureSettings(Settings):
    """How measuring is cut into work; changes no number beyond rounding."""

    batch_images: Count | None = Field(
        default=None, description="images pushed through the network at once; default: as many as the processor's cache holds"
    )
    memory_limit_mb: Integer | None = Field(
        default=None, ge=16, description="MB (10^6) that measuring may take a worker; default: a share of what is free"
    )


def _cluster(name: str) -> str:
    folder = PACKAGE.parent / "flows" / "clusters"
    valid = tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))
    if name not in valid:
        raise ValueError(f"unknown name {name!r}; expected one of {', '.join(valid)}{nearest(name, valid)}")
    return name


class ClusterSettings(Settings):
    """Where tiles are computed."""

    kind: Annotated[str, AfterValidator(_cluster)] = "local"
    workers: Count = 2
    threads_per_worker: Count = Field(default=1, description="torch threads of one worker")


class TrackingSettings(Settings):
    """Where MLflow records the run."""

    experiment: str = "clado"
    uri: str | None = Field(default=None, description="default: SQLite in the run's folder")


class RunConfig(Settings):
    """All settings of a run; everything but the network has a default."""

    network: NetworkSettings
    data: DataSettings = DataSettings()
    bits: Bits = (2, 4, 8)
    layers: LayerSettings = LayerSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    criterion: Literal["kl_to_float", "cross_entropy"] = "kl_to_float"
    estimators: tuple[Annotated[str, _one_of("estimators")], ...] = ("layerwise", "pairwise", "gauss_newton")
    budgets: BudgetSettings = BudgetSettings(average_bits=(2.25, 2.5, 3, 3.5, 4, 5))
    constraints: tuple[ConstraintSettings, ...] = ()
    solver: SolverSettings = SolverSettings()
    measure: MeasureSettings = MeasureSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
    folder: Path | None = Field(
        default=None, description="where the run is kept; default: runs/NETWORK-HASH of the settings that shape it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not self.estimators:
            raise ValueError(f"estimators is empty; expected one or more of {', '.join(available('estimators'))}")
        if len(set(self.estimators)) < len(self.estimators):
            raise ValueError(f"estimators {list(self.estimators)} names one twice")
        if self.data.source == "zoo" and self.network.source != "zoo":
            raise ValueError(
                "the zoo's images are Fashion-MNIST, for the zoo's networks; expected data: {source: folder, path: FOLDER}"
            )
        return self

    def measured_settings(self) -> dict[str, Any]:
        """The settings that a measured number depends on: not budgets, estimators, solver, cluster and tracking."""
        document = self.model_dump(mode="json", include={"network", "data", "bits", "quantizer", "criterion"})
        for unmeasured in ("validation_images", "selection_images"):
            document["data"].pop(unmeasured)
        document["layer_bits"] = {pattern: list(bits) for pattern, bits in self.layers.bits.items()}
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


class _Loader(yaml.SafeLoader):
    """YAML without its silent choice of the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for k, key in enumerate(keys):
            if key in keys[:k]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.value[k][0].start_mark)
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


def parse_config(document: dict[str, Any], whence: str = "configuration") -> RunConfig:
    """A validated configuration from plain data; each fault becomes one line of one ConfigurationError."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors()]
        raise ConfigurationError(f"{whence}: " + "\n  ".join(lines)) from None


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
            said = f"{where!r} is missing; expected for example network: {{source: zoo, name: resnet20_fashion_mnist}}"
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
        case _:
            said = f"{where}: {fault['msg']}, got {shown}"
    return said


def _keys_at(path: Sequence[Any]) -> tuple[str, ...]:
    model: type[BaseModel] = RunConfig
    for name in path:
        annotation = model.model_fields[str(name)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return tuple(model.model_fields)
