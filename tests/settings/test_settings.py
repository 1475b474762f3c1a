"""Configuration: what is refused and with which words, overrides, identity, and that reading one imports nothing heavy."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from clado.errors import ConfigurationError
from clado.plugins import available
from clado.settings.identity import fingerprint
from clado.settings.loading import load_config, load_run_config, parse_config
from clado.settings.schema import RunConfig
from clado.settings.template import render

ROOT = Path(__file__).parents[2]
DEMO: dict[str, Any] = {"network": {"source": "zoo", "name": "resnet20_fashion_mnist"}}
FACTORY: dict[str, Any] = {"network": {"source": "factory", "name": "net:make"}, "data": {"source": "folder", "path": "images"}}

NEEDS_CALIBRATION = "needs calibration images; expected data.calibration_images: 256 or more"

# What differs from the demo, and what the message must hold: what was wrong, what is valid, the nearest name.
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"search": {"evaluations": -1}}, ["search.evaluations", "-1"]),
    ({"effort": "bset"}, ["effort", "'bset'", "fast, balanced, best", "did you mean 'best'"]),
    ({"effort": "best", "corrections": [], "data": {"calibration_images": 0}}, ["effort: best", NEEDS_CALIBRATION]),
    ({"store": "http://host/prefix"}, ["store", "http://host/prefix"]),
    ({"network": None}, ["network", "section", "source, name, weights"]),
    ({"network": "resnet18"}, ["network", "'resnet18'", "source, name, weights"]),
    ({"network": {"source": "zoo"}}, ["network.name", "missing", "resnet20_fashion_mnist"]),
    ({"network": {"name": ""}}, ["network.name"]),
    ({"network": {"name": 3}}, ["network.name", "3"]),
    (
        {"network": {"name": "a", "source": "zo"}},
        ["network.source", "'zo'", "zoo, torchvision, timm, factory", "did you mean 'zoo'"],
    ),
    ({"network": {"name": "a", "source": "factory"}}, ["'a'", "package.module:function"]),
    ({"network": {"name": "a:b", "source": "factory"}}, ["zoo's images", "source: folder"]),
    ({"network": {"name": "resnet18", "source": "torchvision"}}, ["weights", "safetensors", "random"]),
    ({"network": DEMO["network"] | {"image_shape": [3, 224]}}, ["network.image_shape", "too short", "[3, 224, 224]"]),
    ({"network": DEMO["network"] | {"image_shape": [3, 0, 224]}}, ["network.image_shape.1", "0"]),
    ({"network": DEMO["network"] | {"fixed": "conv1"}}, ["network.fixed", "'conv1'", "list", "[conv1]"]),
    ({"network": DEMO["network"] | {"wieghts": "a"}}, ["network.wieghts", "did you mean 'weights'", "image_shape"]),
    ({"quantiser": {}}, ["'quantiser'", "did you mean 'quantizer'", "network, data, bits"]),
    ({"data": {"sead": 1}}, ["'data.sead'", "did you mean 'seed'", "sensitivity_images"]),
    ({"data": 5}, ["data", "5", "section", "sensitivity_images"]),
    ({"data": {"seed": -1}}, ["data.seed", "-1", "0"]),
    ({"data": {"seed": 1.5}}, ["data.seed", "integer", "1.5"]),
    ({"data": {"seed": True}}, ["data.seed", "integer", "True"]),
    ({"data": {"source": "folder"}}, ["folder", "path"]),
    ({"data": {"path": "images"}}, ["path", "source: folder"]),
    ({"data": {"mean": [0.5]}}, ["mean", "source: folder"]),
    ({"data": {"source": "folder", "path": "images", "std": [1, 0, 1]}}, ["data.std.1", "greater than 0"]),
    ({"data": {"sensitivity_images": 4}}, ["16 sample_blocks", "4 sensitivity_images", "sample_blocks: 4"]),
    ({"data": {"sensitivity_images": 0}}, ["data.sensitivity_images", "0"]),
    ({"bits": 4}, ["bits", "4", "list", "[4]"]),
    ({"bits": []}, ["bits", "empty", "[2, 4, 8]"]),
    ({"bits": [0, 4]}, ["bits", "0", "1..16"]),
    ({"bits": [4, 17]}, ["bits", "17", "1..16"]),
    ({"bits": [4, 2]}, ["bits", "[4, 2]", "ascending", "[2, 4]"]),
    ({"bits": [4, 4]}, ["bits", "[4, 4]", "distinct"]),
    ({"bits": [2.5]}, ["bits.0", "integer", "2.5"]),
    ({"bits": [True, 2]}, ["bits.0", "integer", "True"]),
    ({"bits": ["2"]}, ["bits.0", "integer", "'2'"]),
    ({"bits": ["float", 2]}, ["bits", "float once, after the bit-widths"]),
    ({"bits": [2, "flaot"]}, ["bits.1", "'flaot' is no bit-width", "an integer, or float"]),
    ({"quantizer": {"weights": "msee"}}, ["quantizer.weights", "'msee'", "minmax, mse", "did you mean 'mse'"]),
    ({"quantizer": {"scheme": "asymmetric"}}, ["quantizer.scheme", "symmetric, affine", "did you mean 'symmetric'"]),
    ({"quantizer": {"granularity": "per_chanel"}}, ["quantizer.granularity", "did you mean 'per_channel'"]),
    ({"activations": {"bits": 8}}, ["activations.bits", "8", "list", "[8]"]),
    ({"activations": {"bits": [0]}}, ["activations.bits", "0", "1..16"]),
    ({"activations": {"bits": [4, 17]}}, ["activations.bits", "17", "1..16"]),
    ({"activations": {"bits": [8, 4]}}, ["activations.bits", "[8, 4]", "ascending", "[4, 8]"]),
    ({"activations": {"bits": [True]}}, ["activations.bits.0", "integer", "True"]),
    ({"activations": {"range": "mess"}}, ["activations.range", "'mess'", *available("quantizers"), "did you mean 'mse'"]),
    ({"activations": {"bits": [8]}, "data": {"calibration_images": 0}}, ["activations.bits", NEEDS_CALIBRATION]),
    ({"corrections": "gptq"}, ["corrections", "'gptq'", "list", "[gptq]"]),
    ({"corrections": ["gptk"]}, ["corrections.0", "'gptk'", *available("corrections"), "did you mean 'gptq'"]),
    ({"corrections": ["gptq", "gptq"]}, ["corrections", "gptq", "twice"]),
    ({"corrections": ["gptq"], "data": {"calibration_images": 0}}, ["correction gptq", NEEDS_CALIBRATION]),
    ({"adaround": {"steps": 0}}, ["adaround.steps", "0"]),
    ({"network": DEMO["network"] | {"numeric": "bf16"}}, ["network.numeric", "'bf16'", "float32, tf32, bfloat16"]),
    ({"network": DEMO["network"] | {"channels_last": 1}}, ["network.channels_last", "boolean", "1"]),
    ({"criterion": "cross_entrop"}, ["criterion", "cross_entropy, kl_to_float", "did you mean 'cross_entropy'"]),
    ({"metric": "mean_iou"}, ["metric", "'mean_iou'", "package.module:name of a callable (outputs, targets)"]),
    ({"data": {"source": "factory"}}, ["data", "source factory needs a factory", "package.module:function"]),
    ({"data": {"factory": "lab.data:images"}}, ["data", "source zoo takes no factory"]),
    ({"data": {"source": "factory", "factory": "a:b", "resize": 8}}, ["data", "resize is for source folder; a factory's images"]),
    ({"data": {"source": "factory", "factory": "images"}}, ["data.factory", "'images'", "package.module:name of a function"]),
    ({"estimators": ["pairwis"]}, ["estimators.0", "'pairwis'", *available("estimators"), "did you mean 'pairwise'"]),
    ({"estimators": "pairwise"}, ["estimators", "list", "[pairwise]"]),
    ({"estimators": []}, ["estimators", "empty", "pairwise"]),
    ({"estimators": ["pairwise", "pairwise"]}, ["estimators", "twice"]),
    ({"estimators": ["package:"]}, ["estimators.0", "'package:'", "package.module:name"]),
    ({"measure": {"batch_statistics": 1}}, ["measure.batch_statistics", "boolean"]),
    ({"gradients": {"vectors": 0}}, ["gradients.vectors"]),
    ({"budgets": {}}, ["budgets", "average_bits: [3, 4]", "size_bytes"]),
    ({"budgets": {"average_bits": 3}}, ["budgets.average_bits", "3", "list"]),
    ({"budgets": {"average_bits": [0]}}, ["budgets.average_bits.0", "greater than 0"]),
    ({"budgets": {"average_bits": [33]}}, ["budgets.average_bits.0", "32", "33"]),
    ({"budgets": {"average_bits": [float("nan")]}}, ["budgets.average_bits.0", "finite"]),
    ({"budgets": {"average_bits": [3, 3]}}, ["budgets", "twice"]),
    ({"budgets": {"size_bytes": [1.5]}}, ["budgets.size_bytes.0", "integer"]),
    ({"budgets": {"bops": ["4e9"]}}, ["budgets.bops.0", "'4e9'", "text", "4.0e+09"]),
    ({"budgets": {"bops": [-1]}}, ["budgets.bops.0", "greater than 0"]),
    ({"layers": {"bits": {"fc*": [4, 2]}}}, ["layers.bits.fc*", "ascending"]),
    ({"layers": {"ties": ["a"]}}, ["layers.ties.0", "list"]),
    ({"runtime": {"name": "onnxruntim"}}, ["runtime.name", "did you mean 'onnxruntime'"]),
    ({"runtime": {"candidates": "fast"}}, ["runtime.candidates", "all, native"]),
    ({"budgets": {"latency": [0.01]}}, ["budgets.latency needs a runtime", "clado profile"]),
    ({"constraints": [{"kind": "size", "bound": 0}]}, ["constraints.0.bound", "greater than 0"]),
    ({"constraints": [{"kind": "latncy", "bound": 1}]}, ["'latncy'", "did you mean 'latency'"]),
    ({"constraints": [{"bound": 1}]}, ["'constraints.0.kind' is missing"]),
    ({"constraints": [{"knd": "size", "bound": 1}]}, ["'constraints.0.knd'", "did you mean 'kind'", "kind, bound, path"]),
    ({"solver": {"name": "gurobi"}}, ["solver.name", "'gurobi'", *available("solvers")]),
    ({"solver": {"time_limit": 0}}, ["solver.time_limit", "greater than 0"]),
    ({"measure": {"batch_images": 0}}, ["measure.batch_images", "0"]),
    ({"cluster": {"kind": "locl"}}, ["cluster.kind", "'locl'", "local", "did you mean 'local'"]),
    ({"cluster": {"workers": 0}}, ["cluster.workers", "0"]),
    ({"cluster": {"workers": "2"}}, ["cluster.workers", "integer", "'2'"]),
    ({"tracking": {"url": "x"}}, ["tracking.url", "did you mean 'uri'", "experiment"]),
    ({1: 2}, ["1", "strings"]),
]


def section_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += section_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{info.alias or name}")
    return keys


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_setting_is_refused_in_words_that_help(change: dict[Any, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        parse_config(DEMO | change)
    for words in expected:
        assert words in str(refusal.value)
    assert "pydantic" not in str(refusal.value)
    assert "tuple" not in str(refusal.value)


def test_the_table_covers_every_section() -> None:
    assert set(RunConfig.model_fields) - {key for change, _ in BAD for key in change} == {"folder"}


def test_a_working_folder_whose_name_would_end_early_holds_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "what?").mkdir()
    monkeypatch.chdir(tmp_path / "what?")
    with pytest.raises(ConfigurationError, match=r"what\? has a \?"):
        parse_config(DEMO)
    assert parse_config(DEMO | {"tracking": {"uri": "http://x"}}).tracking.uri == "http://x"


@pytest.mark.parametrize(
    ("value", "variable", "expected"),
    [
        (None, None, "sqlite:///HERE/mlflow.db"),
        (None, "", "sqlite:///HERE/mlflow.db"),
        (None, "http://me:hunter2@x", "http://***@x"),
        (None, "sqlite:///a/my.db?timeout=5", "sqlite:///HERE/a/my.db?timeout=5"),
        ("sqlite:///../my.db", "http://x", "sqlite:///ABOVE/my.db"),
        ("sqlite:////a/my.db", None, "sqlite:////a/my.db"),
        ("file:mlruns", None, "file:HERE/mlruns"),
        ("file:///a/mlruns", None, "file:///a/mlruns"),
    ],
)
def test_where_mlflow_is_becomes_absolute_once(value, variable, expected, tmp_path, monkeypatch) -> None:
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    config = parse_config(DEMO | ({} if value is None else {"tracking": {"uri": value}}))
    assert config.tracking.uri == expected.replace("HERE", str(tmp_path)).replace("ABOVE", str(tmp_path.parent))


def test_a_run_keeps_where_mlflow_is_unless_it_is_gone_or_told_otherwise(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "config.yaml", parse_config(DEMO).to_yaml())
    monkeypatch.chdir(tmp_path)

    def uri(value: str | None = None) -> str:
        return load_run_config(tmp_path / "run", value).tracking.uri

    first = f"sqlite:///{tmp_path}/first/mlflow.db"
    assert uri() == first
    (tmp_path / "first").rmdir()
    assert uri("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    assert not caplog.text
    assert uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert f"{first} does not exist any more" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://x")
    assert uri() == "http://x"
    assert uri("http://y") == "http://y"


def test_sections_may_be_merged(tmp_path: Path) -> None:
    anchored = "network: {name: resnet20_fashion_mnist}\ndata: &data {seed: 3}\ngradients:\n  <<: *data\n"
    assert load_config(write(tmp_path / "clado.yaml", anchored)).gradients.seed == 3
    assert load_config(write(tmp_path / "clado.yaml", anchored + "  seed: 4\n")).gradients.seed == 4
    with pytest.raises(ConfigurationError, match="'seed' appears twice"):
        load_config(write(tmp_path / "clado.yaml", anchored + "  seed: 4\n  seed: 5\n"))


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        parse_config(DEMO | {"bits": [4, 2], "quantiser": {}, "cluster": {"workers": 0}})
    for words in ("quantiser", "[4, 2]", "cluster.workers"):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no settings"),
        ("- a\n- b\n", "no settings"),
        ("just words\n", "no settings"),
        ("network: [unclosed\n", "not YAML"),
        ("network: {name: a}\nnetwork: {name: b}\n", "'network' appears twice"),
        ("network: {name: a, name: b}\n", "'name' appears twice"),
        ("network: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("data: {seed: 1}\n", "'network' is missing"),
        ("\x00", "not YAML"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        load_config(write(tmp_path / "clado.yaml", text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml does not exist.*clado init"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigurationError, match="is not a file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigurationError, match="not YAML"):
        load_config(tmp_path / "binary.yaml")


def test_a_section_left_empty_is_its_defaults(tmp_path: Path) -> None:
    text = "network: {name: resnet20_fashion_mnist}\ndata:\n  # seed: 1\n"
    assert load_config(write(tmp_path / "a.yaml", text)) == parse_config(DEMO)
    assert load_config(tmp_path / "a.yaml", ["data.seed=3"]).data.seed == 3


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", DEMO | {"data": {"seed": 1, "sensitivity_images": 32}})
    config = load_config(path, ["data.seed=7", "bits=[3, 5]", "cluster.workers=1", "tracking.uri=http://x:1/a=b"])
    assert (config.data.seed, config.data.sensitivity_images) == (7, 32)
    assert config.bits == (3, 5)
    assert config.cluster.workers == 1
    assert config.tracking.uri == "http://x:1/a=b"
    assert load_config(path, ["data.seed=7", "data.seed=8"]).data.seed == 8


@pytest.mark.parametrize("key", section_keys(RunConfig))
def test_every_setting_can_be_overridden(tmp_path: Path, key: str) -> None:
    """An override of a setting with a foolish value is refused by that setting: so it got there."""
    path = write(tmp_path / "a.yaml", DEMO)
    with pytest.raises(ConfigurationError, match=re.escape(key)):
        load_config(path, [f"{key}={{no: such}}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.seed", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("data.sead=1", "did you mean 'seed'"),
        ("dta.seed=1", "did you mean 'data'"),
        ("bits=[2", "not YAML"),
        ("bits.0=2", "'bits' is a value, not a section"),
        ("data.seed.deep=2", "'seed' is a value, not a section"),
        ("bits=[8, 2]", "ascending"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path / "a.yaml", DEMO | {"bits": [2, 4], "data": {"seed": 1}})
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        load_config(path, [override])


def test_settings_are_frozen() -> None:
    config = parse_config(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.data.seed = 3  # type: ignore[misc]


def test_the_fingerprint_does_not_depend_on_order_or_spelling_or_process() -> None:
    """Keys in another order, integers for floats and defaults written out are the same settings."""
    plain = parse_config(DEMO | {"data": {"seed": 1, "sensitivity_images": 64}, "budgets": {"average_bits": [3]}})
    turned = parse_config(
        {"budgets": {"average_bits": [3.0]}, "data": {"sensitivity_images": 64, "seed": 1}, **DEMO, "bits": [2, 4, 8]}
    )
    assert fingerprint(plain.model_dump(mode="json")) == fingerprint(turned.model_dump(mode="json"))
    imports = "from clado.settings.loading import parse_config; from clado.settings.identity import fingerprint"
    program = f"{imports}; print(fingerprint(parse_config({DEMO!r}).measured_settings()))"
    for seed in ("1", "2"):
        printed = run_python(program, PYTHONHASHSEED=seed)
        assert printed.strip() == fingerprint(parse_config(DEMO).measured_settings())


@pytest.mark.parametrize("document", [{"b": 1, "a": [1, 2.5, None, "é"]}, [], {"a": {"c": 1, "b": 2}}])
def test_the_fingerprint_is_the_hash_of_canonical_json(document: Any) -> None:
    import hashlib
    import json

    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert fingerprint(document) == hashlib.sha256(text.encode()).hexdigest()


def test_settings_that_are_off_leave_a_run_its_name() -> None:
    """Folders of runs measured before these settings existed are found again."""
    config = parse_config(DEMO | {"activations": {"bits": []}, "corrections": []})
    assert config.run_folder == Path("runs/resnet20_fashion_mnist-7a2f2776")
    measured = config.measured_settings()
    assert not {"activations", "corrections", "adaround"} & set(measured)
    assert not {"numeric", "channels_last"} & set(measured["network"])


MEASURED = [
    "bits=[2, 4]",
    "layers.bits={fc.weight: [8]}",
    "network.fixed=[conv1.weight]",
    "network.split=[fc.weight]",
    "quantizer.weights=minmax",
    "criterion=cross_entropy",
    "criterion=my_lab.losses:loss",
    "data.seed=1",
    "data.calibration_images=8",
    "network.numeric=bfloat16",
    "network.channels_last=true",
    "activations.bits=[8]",
    "corrections=[gptq]",
]
UNMEASURED = [
    "budgets.average_bits=[3]",
    "estimators=[layerwise]",
    "metric=my_lab.metrics:mean_iou",
    "solver.name=greedy",
    "layers.ties=[[conv1.weight, fc.weight]]",
    "constraints=[{kind: bops, bound: 1.0e+9}]",
    "cluster.workers=1",
    "tracking.experiment=x",
    "data.validation_images=10",
    "measure.batch_images=8",
    "activations.range=minmax",  # while activations stay in float
    "adaround.steps=10",  # while it is not among the corrections
]


@pytest.mark.parametrize(("override", "changes"), [(o, True) for o in MEASURED] + [(o, False) for o in UNMEASURED])
def test_only_what_shapes_a_measured_number_names_the_run(tmp_path: Path, override: str, changes: bool) -> None:
    path = write(tmp_path / "a.yaml", DEMO)
    assert (load_config(path, [override]).run_folder != load_config(path).run_folder) is changes


def test_the_details_of_what_is_on_name_the_run_too() -> None:
    mse, minmax = (parse_config(DEMO | {"activations": {"bits": [8], "range": name}}) for name in ("mse", "minmax"))
    assert mse.run_folder != minmax.run_folder
    assert mse.measured_settings()["activations"] == {"bits": [8], "range": "mse"}


@pytest.mark.parametrize("document", [DEMO, FACTORY], ids=["zoo", "factory"])
def test_written_settings_load_as_the_same(tmp_path: Path, document: dict[str, Any]) -> None:
    config = parse_config(document)
    assert load_config(write(tmp_path / "a.yaml", config.to_yaml())) == config


def test_the_template_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "a.yaml", render())) == parse_config(DEMO)


@pytest.mark.parametrize("data", ["images", 'with space: and # and "quotes" {0}', "C:\\images", "büro"])
def test_the_template_for_ones_own_network(tmp_path: Path, data: str) -> None:
    expected = parse_config({"network": {"source": "factory", "name": "net:make"}, "data": {"source": "folder", "path": data}})
    assert load_config(write(tmp_path / "a.yaml", render("net:make", data))) == expected


def test_the_template_refuses_what_would_not_load() -> None:
    with pytest.raises(ConfigurationError, match=r"package\.module:function"):
        render("net", "images")
    with pytest.raises(ConfigurationError, match="--data FOLDER"):
        render("net:make", None)
    with pytest.raises(ConfigurationError, match="--network"):
        render(None, "images")


LEFT_OUT = {
    "measure.batch_images": "changes speed only; the default fits",
    "measure.memory_limit_mb": "changes speed only; the default fits",
    "measure.batch_statistics": "batchnorm_reestimation without measuring under it is as good, and exact (CORRECTIONS.md)",
    "cluster.device": "auto takes the GPU that there is",
    "data.resize": "for folders",
    "data.path": "for folders",
    "data.mean": "for folders",
    "data.std": "for folders",
    "data.class_balanced": "for folders",
    "data.factory": "for folders",
    "data.max_corrupt_images": "for folders",
    "data.interpolation": "the weights say it; few would choose another",
    "data.class_numbers": "auto is right for ImageNet's synsets and for other names",
    "data.skip": "filled from max_corrupt_images",
    "network.weights_name": "for torchvision's weights under another file name (recipes/imagenet)",
    "network.image_shape": "for factories",
    "network.graph": "the refusal of a network without a graph names it",
}


def mentioned(text: str) -> set[str]:
    """Keys set or shown in a comment, as section.key."""
    keys, section = set(), ""
    for line in text.splitlines():
        if key_line := re.match(r"( *)(?:# )?( *)(\w+):(?: |$)", line):
            name = key_line[3]
            section = "" if not key_line[1] + key_line[2] else section
            keys.add(f"{section}{name}")
            section = section or f"{name}."
    return keys


def test_the_template_shows_every_key_or_leaves_it_out_on_purpose() -> None:
    every, named = set(section_keys(RunConfig)), mentioned(render("net:make", "images"))
    assert every - mentioned(render()) == set(LEFT_OUT)
    assert every - named == {key for key, why in LEFT_OUT.items() if why not in ("for folders", "for factories")}
    sections = set(RunConfig.model_fields)
    assert mentioned(render()) <= every | sections
    assert named <= every | sections


def test_the_template_explains_each_setting() -> None:
    for line in render().splitlines():
        if re.match(r" +(?:# )?\w+: ", line) and not re.match(r" +(workers|threads_per_worker|name: res)", line):
            assert line.count("#") >= 1, line


def run_python(program: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "numpy", "prefect", "mlflow", "distributed", "zarr", "pyscipopt")


def test_reading_a_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", render())
    program = f"""
import sys
from pathlib import Path
from clado.settings.loading import load_config
from clado.errors import ConfigurationError
from clado.settings.template import render
render()
load_config(Path({str(path)!r}), ["data.seed=1"])
try:
    load_config(Path({str(path)!r}), ["estimators=[pairwis]"])
except ConfigurationError as error:
    print("refused", error)
print("heavy", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    begin = time.perf_counter()
    printed = run_python(program)
    assert "refused" in printed
    assert "heavy []" in printed
    # The claim is one second; a loaded machine gets thirty, which importing torch in the way would still not explain away.
    assert time.perf_counter() - begin < 30


def test_the_import_test_can_fail() -> None:
    assert "numpy" in run_python(f"import sys, numpy; print(sorted(set({HEAVY!r}) & set(sys.modules)))")
