"""Reads an assignment from a file: our JSON, a mapping of names to bits, or a peer's settings.

assignment.schema.json describes our JSON. Peers' files are:

- ModelOpt's `quant_cfg` list, alone or in its configuration
- torchao's FqnToConfig, written by `config_to_dict`
- MCT's BitWidthConfig, written by `json.dumps(config, default=vars)`
- the Python files that `snippets` writes. Only the literals `BITS` and `ACTIVATION_BITS` are read.
  Nothing is run.

Only the bit-widths of weights are taken from another library's settings. Ranges, groups and
activations are not, because an assignment is scored by our quantizer's measurements. Unknown or
missing layers, and bits that are not a candidate, are refused with a message that names them.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from clado.bits import MAX_BITS, MIN_BITS
from clado.errors import ConfigurationError
from clado.plugins import nearest
from clado.space import Assignment, SearchSpace

FORMAT = "clado-assignment/1"
EXPECTED = (
    f'expected {{"format": "{FORMAT}", "bits": {{layer: bits}}, ...}}, a plain {{layer: bits}}, a quant_cfg of ModelOpt, '
    "an FqnToConfig of torchao, a BitWidthConfig of MCT, or an assignment_<peer>.py that `clado export` wrote"
)
# torchao configurations that fix the width of their weights
_TORCHAO_WIDTHS = {"Int8WeightOnlyConfig": 8, "Int8DynamicActivationInt8WeightConfig": 8, "Int4WeightOnlyConfig": 4}
_MCT_FLOAT = 32


def read_assignment(path: Path, space: SearchSpace) -> Assignment:
    """The assignment in a file, in the order of the space; None if the file leaves a layer in float."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            document, widths = _literal(text, "BITS"), _literal(text, "ACTIVATION_BITS")
            if document is None:
                raise ConfigurationError(f"no literal BITS = {{layer: bits}}; {EXPECTED}")
        else:
            document = json.loads(text, object_pairs_hook=_unique_mapping)
            widths = document.get("activation_bits") if isinstance(document, dict) and document.get("format") == FORMAT else None
        return _assignment(_bits(document, space), widths or {}, space, document)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, SyntaxError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); {EXPECTED}") from None


def _unique_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigurationError(f"named twice: {_list(sorted({name for name in names if names.count(name) > 1}))}")
    return mapping


def _literal(text: str, name: str) -> Any:
    """The literal that a snippet assigns to a name; None if there is none."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            try:
                return ast.literal_eval(statement.value)
            except ValueError:
                break
    return None


def _bits(document: Any, space: SearchSpace) -> dict[str, Any]:
    """The entries of the file, by parameter name."""
    if isinstance(document, list):
        return _modelopt(document, space)
    if not isinstance(document, dict) or not document:
        raise ConfigurationError(f"not an assignment; {EXPECTED}")
    if isinstance(document.get("format"), str):
        return _clado_format(document)
    if "quant_cfg" in document:
        return _modelopt(document["quant_cfg"], space)
    if "_type" in document:
        return _torchao(document, space)
    if "manual_weights_bit_width_selection_list" in document:
        return _mct(document["manual_weights_bit_width_selection_list"], space)
    if any(isinstance(value, (dict, list)) for value in document.values()):
        raise ConfigurationError(f"not an assignment; {EXPECTED}")
    return _plain_mapping(document, space)


def _clado_format(document: dict[str, Any]) -> dict[str, Any]:
    """The bits of our own format. Every field is checked against the schema."""
    if document["format"] != FORMAT:
        raise ConfigurationError(f"format is {document['format']!r}; expected {FORMAT!r}")
    bits, average, size = (document.get(key) for key in ("bits", "average_bits", "size_bytes"))
    if not isinstance(bits, dict) or not bits:
        raise ConfigurationError(f"bits is {bits!r}; expected an object of layer names to bits")
    widths = document.get("activation_bits", {"": None})  # the key may be absent, but its value not empty
    if not isinstance(widths, dict) or not widths:
        raise ConfigurationError(f"activation_bits is {widths!r}; expected an object of layer names to bits, or none at all")
    if isinstance(average, bool) or not isinstance(average, (int, float)) or not average >= 0:
        raise ConfigurationError(f"average_bits is {average!r}; expected a number from 0")
    if (_integer(size) or 0) < 0 or _integer(size) is None:
        raise ConfigurationError(f"size_bytes is {size!r}; expected an integer from 0")
    for key, types in (("estimator", str), ("loss_predicted", (int, float)), ("status", str)):
        if key in document and (isinstance(document[key], bool) or not isinstance(document[key], types)):
            raise ConfigurationError(f"{key} is {document[key]!r}; expected {'a string' if types is str else 'a number'}")
    return bits


def _assignment(bits: Mapping[str, Any], widths: Mapping[str, Any], space: SearchSpace, document: Any) -> Assignment:
    """The bits in the order of the space. Each layer has one of its candidates, or stays in float.

    Otherwise it raises ConfigurationError, with all errors.
    """
    faults = []
    if unknown := [f"{name}{nearest(name, space.names)}" for name in {**bits, **widths} if name not in space.names]:
        faults.append(f"no searched layer is called {_list(unknown)}")
    if missing := [name for name in space.names if name not in bits]:
        faults.append(f"these layers are missing: {_list(missing)}")
    for layer, candidates in zip(space.layers, space.bit_widths, strict=True):
        if layer.name in bits and bits[layer.name] is not None:
            weight_bits = _integer(bits[layer.name])
            if weight_bits is None or not MIN_BITS <= weight_bits <= MAX_BITS:
                faults.append(f"{layer.name} has {bits[layer.name]!r}, expected an integer within {MIN_BITS}..{MAX_BITS}")
            elif weight_bits not in candidates:
                faults.append(
                    f"{layer.name} has {weight_bits} bits, which were not measured; its candidates are {list(candidates)}"
                )
        if (width := widths.get(layer.name)) is not None:
            input_bits = _integer(width)
            if input_bits is None or not MIN_BITS <= input_bits <= MAX_BITS:
                faults.append(f"{layer.name} has activations at {width!r}, expected an integer within {MIN_BITS}..{MAX_BITS}")
    if faults:
        raise ConfigurationError("; ".join(faults))
    activation_bits = tuple(_integer(widths.get(name)) for name in space.names) if widths else ()
    assignment = space.completed(Assignment(tuple(_integer(bits[name]) for name in space.names), activation_bits))
    space.chosen_options(assignment)  # refuses activation widths that are not candidates
    if isinstance(document, dict) and document.get("format") == FORMAT:
        size = space.size_bytes(assignment)
        if document["size_bytes"] != size:
            raise ConfigurationError(
                f"size_bytes is {document['size_bytes']:,}, but this assignment has {size:,}: the network is another"
            )
    return assignment


def _plain_mapping(document: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Bits by parameter, from a mapping whose keys are parameters, or modules with one weight."""
    bits: dict[str, Any] = {}
    for name, value in document.items():
        layer = name if name in space.names or f"{name}.weight" not in space.names else f"{name}.weight"
        if layer in bits:
            raise ConfigurationError(f"named twice: {layer}, as a parameter and as its module")
        bits[layer] = value
    return bits


def _modelopt(entries: Any, space: SearchSpace) -> dict[str, Any]:
    """ModelOpt's ordered list. The last entry that matches a weight quantizer counts. `enable` alone keeps the width."""
    if not isinstance(entries, list):
        raise ConfigurationError("quant_cfg is no list; the mapping of older ModelOpt is not read: its order is ambiguous")
    widths: dict[str, Any] = {}
    is_enabled: dict[str, bool] = {}
    for entry in entries:
        pattern = entry.get("quantizer_name") if isinstance(entry, dict) else None
        if not isinstance(pattern, str):
            raise ConfigurationError(f"quant_cfg holds {entry!r}; expected {{'quantizer_name': ..., 'cfg': ..., 'enable': ...}}")
        parent, cfg = entry.get("parent_class"), entry.get("cfg")
        matches = [
            layer.name
            for layer in space.layers
            if fnmatchcase(f"{layer.name}_quantizer", pattern)
            and (parent is None or str(parent).lower() == f"nn.{layer.operator.replace('_', '')}")
        ]
        if not matches and pattern.endswith("weight_quantizer") and not re.search(r"[*?\[]", pattern):
            raise ConfigurationError(f"no searched layer has the quantizer {pattern!r}{nearest(pattern, space.names)}")
        for name in matches:
            is_enabled[name] = entry.get("enable", True) is not False
            if isinstance(cfg, dict):
                widths[name] = cfg.get("num_bits", 8)
            elif cfg is not None:
                widths[name] = cfg  # several quantizers in sequence have no single width
            else:
                widths.setdefault(name, 8)
    return {name: widths[name] if enabled else None for name, enabled in is_enabled.items()}


def _torchao(document: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """A torchao FqnToConfig: entries by parameter, by module, by pattern, or as default of linear layers.

    The first match counts.
    """
    data = document.get("_data")
    table = (data.get("fqn_to_config") or data.get("module_fqn_to_config")) if isinstance(data, dict) else None
    if document["_type"] not in ("FqnToConfig", "ModuleFqnToConfig") or not isinstance(table, dict):
        raise ConfigurationError(f"a torchao configuration {document['_type']!r} names no layers; expected an FqnToConfig")
    exact = {key for key in table if not key.startswith("re:") and key != "_default"}
    widths: dict[str, Any] = {}
    for layer in space.layers:
        module = layer.name.rpartition(".")[0]
        patterns = [key for key in table if key.startswith("re:")]
        keys = [
            *(name for name in (layer.name, module) if name in exact),
            *(key for name in (layer.name, module) for key in patterns if _full_match(key[3:], name)),
            *(["_default"] if "_default" in table and layer.operator == "linear" else []),
        ]
        exact -= {layer.name, module}
        if keys:
            widths[layer.name] = _torchao_width(table[keys[0]])
    return widths | {name: table[name] for name in exact}  # the other names are unknown: the caller refuses them


def _torchao_width(config: Any) -> Any:
    """Bits of a torchao configuration, or its name if it has no integer width."""
    if not isinstance(config, dict):
        return config
    data = config.get("_data")
    dtype = data.get("weight_dtype") if isinstance(data, dict) else None
    name = dtype.get("_data") if isinstance(dtype, dict) else None
    if isinstance(name, str) and (match := re.fullmatch(r"int(\d+)", name)):
        return int(match[1])
    return _TORCHAO_WIDTHS.get(str(config.get("_type")), config.get("_type"))


def _mct(selections: Any, space: SearchSpace) -> dict[str, Any]:
    """MCT's manual choices; the last one counts. A node has its module's name, followed by '_bn' if a norm is folded."""
    if not isinstance(selections, list):
        raise ConfigurationError("manual_weights_bit_width_selection_list is not a list")
    widths: dict[str, Any] = {}
    for selection in selections:
        names = _mct_names(selection.get("filter")) if isinstance(selection, dict) else None
        if not names:
            raise ConfigurationError(f"only choices by node name can be read, not {selection!r}")
        if selection.get("attr") not in ("weight", "kernel_attr"):
            continue
        matches = [layer.name for layer in space.layers if names & _mct_nodes(layer.name)]
        if len(matches) > 1:
            raise ConfigurationError(f"the node {_list(sorted(names))} could be any of {_list(matches)}")
        bits = selection.get("bit_width")
        widths[matches[0] if matches else min(names, key=len)] = None if bits == _MCT_FLOAT else bits
    return widths


def _mct_names(node_filter: Any) -> set[str]:
    """Node names that a filter accepts; none if it consists of more than names."""
    if not isinstance(node_filter, dict):
        return set()
    if set(node_filter) == {"matcher_a", "matcher_b"}:  # an "or" filter, probably
        sides = [_mct_names(side) for side in node_filter.values()]
        return sides[0] | sides[1] if all(sides) else set()
    name = node_filter.get("node_name")
    return {name} if isinstance(name, str) else set()


def _mct_nodes(parameter: str) -> set[str]:
    """Names that torch.fx and MCT may give to the node of a parameter's module."""
    node = re.sub(r"(?<=[a-z])([A-Z])", r"_\1", parameter.rpartition(".")[0].replace(".", "_")).lower()
    names = {node, f"_{node}", parameter.rpartition(".")[0].replace(".", "_")}
    return names | {f"{name}_bn" for name in names}


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigurationError(f"the pattern {pattern!r} is not a regular expression: {error}") from None


def _integer(value: Any) -> int | None:
    """The value if JSON treats it as an integer (4 and 4.0, but not true)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value)


def _list(names: Iterable[str], limit: int = 8) -> str:
    """The names, at most eight of them."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
