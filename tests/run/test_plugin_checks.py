"""What settings ask of plug-ins is checked when the run is opened: before anything is loaded, started or written."""

from typing import Any

import pytest

from clado.errors import ConfigurationError
from clado.run.opened_run import open_run
from clado.run.plugin_checks import check_plugins
from clado.settings.loading import parse_config

DEMO: dict[str, Any] = {"network": {"source": "zoo", "name": "resnet20_fashion_mnist"}}

# What differs from the demo, and what the message must hold.
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"estimators": ["hawq"], "activations": {"bits": [4, 8]}}, ["estimator hawq", "[4, 8]", "one width"]),
    ({"estimators": ["fisher"], "measure": {"batch_statistics": True}}, ["estimator fisher", "batch_statistics"]),
    ({"corrections": ["gptq", "output_statistics", "adaround"]}, ["corrections names both gptq and adaround", "one way"]),
    ({"constraints": [{"kind": "latency", "bound": 1}]}, ["constraints", "kind latency needs path", "layer,bits"]),
    ({"constraints": [{"kind": "size", "bound": 1, "path": "a.csv"}]}, ["constraints", "kind size takes no path"]),
    ({"constraints": [{"kind": "bops", "bound": 1, "scales": True}]}, ["constraints", "kind size"]),
    ({"estimators": ["no_such_package:estimator"]}, ["estimator 'no_such_package:estimator'", "no module 'no_such_package'"]),
    ({"solver": {"name": "json:dums"}}, ["solver 'json:dums'", "json has no name 'dums'", "did you mean 'dumps'"]),
    (
        {"criterion": "json:JSONDecoder"},
        ["criterion json:JSONDecoder is the class JSONDecoder", "(outputs, float_outputs, targets)", "clado.criteria.Criterion"],
    ),
    ({"quantizer": {"weights": "json:JSONDecoder"}}, ["the class JSONDecoder", "clado.quantization.quantizers.Quantizer"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(change) for change, _ in BAD])
def test_what_does_not_suit_a_plugin_is_refused_in_words_that_help(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        open_run(parse_config(DEMO | change))
    for word in words:
        assert word in str(refusal.value)


def test_the_defaults_suit_their_plugins() -> None:
    check_plugins(parse_config(DEMO))
