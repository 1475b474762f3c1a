"""Budgets by keyword, fronts, progress, and the mistakes that a first use makes: each gets a message."""

import re
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import clado
from clado.choosing.constraints import constraint
from clado.errors import CladoError, ConfigurationError, DataError, InfeasibleError, NetworkError
from tests.networks import Residual, build, images, labels
from tests.synthetic import make_matrix, make_space

NETWORK = clado.Network(build(Residual), images(1))
SPACE = NETWORK.search_space((2, 4, 8))
PREPARED = clado.prepare(NETWORK, SPACE)
MATRIX = clado.measure(NETWORK, SPACE, images(6), "layerwise", prepared=PREPARED)
MACS = sum(layer.macs for layer in NETWORK.layers)


@pytest.fixture
def table(tmp_path):
    """A CSV file where a bit of a weight takes a nanosecond."""
    rows = [f"{layer.name},{b},{layer.num_weights * b * 1e-9}" for layer in SPACE.layers for b in (2, 4, 8)]
    (tmp_path / "times.csv").write_text("\n".join(["layer,bits,seconds", *rows]))
    return tmp_path / "times.csv"


# -- budgets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "bound", "value"),
    [
        ("average_bits", 3.0, SPACE.average_bits),
        ("size_bytes", 180, SPACE.size_bytes),
        ("percent_of_8_bit", 40, lambda a: 100 * SPACE.size_bytes(a) / SPACE.size_bytes(SPACE.widest)),
        ("bops", MACS * 8 * 3.5, lambda a: sum(n.macs * b * 8 for n, b in zip(SPACE.layers, a.bits, strict=True))),
    ],
)
def test_every_budget_is_a_keyword(keyword, bound, value):
    solution = clado.solve(MATRIX, **{keyword: bound}, solver="exhaustive")
    assert value(solution.assignment) <= bound
    wider = clado.solve(MATRIX, **{keyword: 1.5 * bound}, solver="exhaustive")
    assert wider.objective < solution.objective
    assert value(wider.assignment) > value(solution.assignment)


@pytest.mark.parametrize("keyword", ["latency", "table"])
def test_budgets_of_a_table_name_its_file(keyword, table):
    bound = 3e-9 * SPACE.num_weights
    solution = clado.solve(MATRIX, **{keyword: (bound, str(table))}, solver="exhaustive")
    same = clado.solve(MATRIX, average_bits=3.0, solver="exhaustive")
    assert solution.assignment == same.assignment
    assert clado.solve(MATRIX, **{keyword: (bound, table)}, solver="exhaustive").assignment == same.assignment


def test_all_limits_hold_together(table):
    limits = [constraint("size", SPACE, 170)]
    both = clado.solve(MATRIX, average_bits=4, latency=(5e-9 * SPACE.num_weights, table), limits=limits, solver="exhaustive")
    assert SPACE.size_bytes(both.assignment) <= 170
    assert clado.solve(MATRIX, limits=limits, solver="exhaustive").objective == both.objective


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, r"no limit, so the widest bits everywhere .*average_bits=3\.0, size_bytes=100_000, .*latency=\(0\.002"),
        ({"average_bits": "3"}, r"average_bits is '3' of type str; expected a number, such as average_bits=3\.0"),
        ({"average_bits": [2, 3]}, r"\[2, 3\] of type list; expected a number.*clado\.front"),
        ({"size_bytes": True}, "size_bytes is True of type bool"),
        ({"size_bytes": -3}, "expected a finite number above 0"),
        ({"bops": float("nan")}, "bops is nan"),
        ({"latency": 0.002}, r'latency is 0\.002; expected a bound and a CSV file.*\(0\.002, "times\.csv"\)'),
        ({"table": ("costs.csv", 3)}, "expected a bound and a CSV file"),
        ({"latency": (0.1, "absent.csv")}, "absent.csv"),
    ],
)
def test_a_budget_that_is_none_is_refused(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        clado.solve(MATRIX, **keywords)


# -- fronts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["average_bits", "size_bytes", "percent_of_8_bit", "bops"])
def test_a_front_is_the_answer_to_each_budget(keyword):
    bounds = {
        "average_bits": (3, 2.5, 4, 3), "size_bytes": (150, 200), "percent_of_8_bit": (50, 30), "bops": (MACS * 20, MACS * 40)
    }[keyword]  # fmt: skip
    front = clado.front(MATRIX, **{keyword: bounds}, solver="exhaustive")
    assert front.bounds == tuple(sorted(set(bounds)))
    for bound, solution in zip(front.bounds, front.solutions, strict=True):
        assert solution.objective == clado.solve(MATRIX, **{keyword: bound}, solver="exhaustive").objective


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "none is given"),
        ({"average_bits": [3], "bops": [4]}, "average_bits, bops is given"),
        ({"average_bits": 3}, "expected several bounds"),
        ({"average_bits": []}, "is empty"),
        ({"average_bits": ["3"]}, "'3' of type str"),
    ],
)
def test_a_front_has_one_series_of_budgets(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        clado.front(MATRIX, **keywords)


def test_a_front_out_of_reach_is_refused():
    with pytest.raises(InfeasibleError, match="reachable"):
        clado.front(MATRIX, average_bits=[1, 3])


# -- progress ----------------------------------------------------------------------------------------------------------------

CALLS = {
    "prepare": lambda progress: clado.prepare(NETWORK, SPACE, progress=progress),
    "measure": lambda progress: clado.measure(NETWORK, SPACE, images(6), "layerwise", progress=progress),
    "evaluate": lambda progress: clado.evaluate(NETWORK, SPACE.widest, images(1200), progress=progress),
}


@pytest.mark.parametrize("name", CALLS)
def test_progress_is_told_in_order_and_to_its_end(name):
    steps = []
    CALLS[name](lambda *now: steps.append(now))
    assert steps == sorted(steps)
    assert len({total for _, total in steps}) == 1
    assert steps[-1][0] == steps[-1][1]
    assert len(steps) > 1


def test_progress_true_is_a_bar(capsys):
    CALLS["prepare"](True)
    assert re.search(r"preparing: 100%.*5/5", capsys.readouterr().err)


def test_the_steps_of_an_evaluation_change_no_number():
    silent = clado.evaluate(NETWORK, SPACE.narrowest, (images(300), labels(300)))
    assert clado.evaluate(NETWORK, SPACE.narrowest, (images(300), labels(300)), progress=lambda *now: None) == silent


def test_progress_of_another_kind_is_refused():
    with pytest.raises(ConfigurationError, match=r"progress is 'bar'; expected True for a bar, or a callable"):
        CALLS["prepare"]("bar")


@pytest.mark.parametrize(("module", "call"), [("tqdm.auto", lambda: CALLS["prepare"](True)), ("pandas", MATRIX.to_frame)])
def test_a_library_that_is_missing_is_named(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=f"pip install {module.partition('.')[0]}"):
        call()


# -- mistakes ----------------------------------------------------------------------------------------------------------------


class Text(nn.Module):
    """Reads token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).mean(1))


SOLUTION = clado.solve(MATRIX, average_bits=3, solver="exhaustive")
MISTAKES = {
    "a text model": (lambda: clado.Network(Text(), torch.randint(50, (2, 16))), DataError, "int64.*token ids"),
    "bytes": (lambda: clado.Network(build(Residual), images(1).byte()), DataError, r"uint8.*/ 255 - mean"),
    "a name": (lambda: clado.Network("resnet18", images(1)), NetworkError, "a str; expected a torch.nn.Module"),
    "DataParallel": (lambda: clado.Network(nn.DataParallel(build(Residual)), images(1)), NetworkError, "model.module"),
    "compiled": (lambda: clado.Network(torch.compile(build(Residual)), images(1)), NetworkError, "model._orig_mod"),
    "a module": (lambda: clado.measure(build(Residual), SPACE, images(4)), ConfigurationError, r"Residual; .*clado\.Network"),
    "bits": (lambda: clado.measure(NETWORK, (2, 4), images(4)), ConfigurationError, r"\(2, 4\) of type tuple; .*search_space"),
    "a dictionary": (
        lambda: clado.evaluate(NETWORK, {"stem.weight": 4}, images(4)), ConfigurationError, r"a dict; .*clado\.Assignment"
    ),
    "a solution": (lambda: clado.quantize(NETWORK, SOLUTION), ConfigurationError, r"its assignment: solution\.assignment"),
    "a tuple": (lambda: clado.quantize(NETWORK, (2,) * 5), ConfigurationError, r"of type tuple; expected a clado\.Assignment"),
    "no matrix": (lambda: clado.solve(np.eye(3), average_bits=3), ConfigurationError, r"expected clado\.measure"),
    "prepared": (
        lambda: clado.quantize(NETWORK, SPACE.widest, prepared=SPACE), ConfigurationError, r"expected clado\.prepare"
    ),
    "a dataset": (lambda: clado.measure(NETWORK, SPACE, TensorDataset(images(4))), DataError, r"DataLoader\(dataset"),
    "an array": (lambda: clado.measure(NETWORK, SPACE, images(4).numpy()), DataError, r"torch\.from_numpy"),
    "a picture of nothing": (lambda: clado.plot(SPACE), ConfigurationError, "cannot draw a SearchSpace"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_answered_with_what_to_do(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, CladoError)


def test_a_list_of_images_and_labels_is_one_labelled_batch():
    pair = (images(6), labels(6))
    assert clado.evaluate(NETWORK, SPACE.widest, list(pair)) == clado.evaluate(NETWORK, SPACE.widest, pair)
    two = clado.evaluate(NETWORK, SPACE.widest, [images(6), images(6)])
    assert (two.num_images, two.top1) == (12, None)


def test_pixels_that_nobody_normalised_are_warned_of():
    with pytest.warns(UserWarning, match=r"pixels reach from 0 to 255.*\(images / 255 - mean\) / std"):
        clado.evaluate(NETWORK, SPACE.widest, torch.linspace(0, 255, 64).reshape(1, 1, 8, 8))
    with warnings.catch_warnings(action="error"):
        for x in (images(4), images(4).abs(), 30 * images(4)):  # normalised, within 0..1 or so, and large but signed
            clado.evaluate(NETWORK, SPACE.widest, x)


# -- how results show themselves ---------------------------------------------------------------------------------------------

BIG = make_matrix(make_space(22))
RESULTS = {"matrix": BIG, "solution": clado.solve(BIG, average_bits=3, solver="greedy")}
RESULTS["front"] = clado.front(BIG, average_bits=(2.5, 3, 4), solver="greedy")


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_short_as_text_a_table_in_notebooks_and_a_frame(name):
    result = RESULTS[name]
    assert len(repr(result)) < 160
    assert "\n" not in repr(result)
    html = result._repr_html_()
    assert html.count("<tr>") <= 43
    assert all(f"<th>{key.replace('_', ' ')}</th>" in html for key in result.rows()[0])
    assert len(result.to_frame()) == len(result.rows())


def test_names_are_escaped_in_html():
    space = clado.SearchSpace.uniform([clado.Layer("<b>&.weight", (2, 2), "linear")], (2, 4))
    html = make_matrix(space)._repr_html_()
    assert "&lt;b&gt;&amp;.weight" in html
    assert "<b>" not in html


def test_a_frame_of_a_matrix_is_labelled():
    frame = MATRIX.to_frame()
    assert frame.loc[SPACE.label(0), SPACE.label(0)] == MATRIX.values[0, 0]
    assert [row["loss_alone"] for row in MATRIX.rows()] == (np.diag(MATRIX.values) / 2).tolist()


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_a_picture_in_two_lines(name, tmp_path):
    figure = clado.plot(RESULTS[name])
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == figure._repr_png_()[:4] == b"\x89PNG"
