"""Laws of what can be chosen: sizes are integers of the packed bits, options and assignments translate into one another."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clado.bits import check_bits
from clado.errors import ConfigurationError
from clado.space import Assignment, Layer, SearchSpace

LAYERS = (Layer("a.weight", (3, 5), "linear"), Layer("b.weight", (2, 2, 3, 3), "conv2d"), Layer("c.weight", (7,), "linear"))
SPACE = SearchSpace(LAYERS, ((2, 4, 8), (4, 8), (1, 16)))
FLOAT, ONE, SEVERAL = SPACE, SPACE.with_activations([8]), SPACE.with_activations([4, 6, 8])
SPACES = pytest.mark.parametrize("space", [FLOAT, ONE, SEVERAL], ids=["float", "one", "several"])


def assignments(space: SearchSpace, floats: bool = False) -> st.SearchStrategy[Assignment]:
    """Any assignment of a space; with `floats` some layers may be left in float."""
    layers = [[*space.candidates(i), *([(None, None)] if floats else [])] for i in range(space.num_layers)]
    return st.tuples(*map(st.sampled_from, layers)).map(
        lambda pairs: Assignment(tuple(b for b, _ in pairs), tuple(a for _, a in pairs) if space.has_activations else ())
    )


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ([], "empty"),
        ([0, 2], "1..16"),
        ([2, 17], "1..16"),
        ([4, 2], "ascending"),
        ([2, 2], "ascending"),
        ([2.0], "integers"),
        ([True], "integers"),
    ],
)
def test_bits_are_ascending_integers_within_1_to_16(bits, says):
    with pytest.raises(ConfigurationError, match=says):
        check_bits(bits)


@SPACES
def test_options_number_every_candidate_of_every_layer_once_and_in_order(space):
    assert [space.option(*option) for option in space.options] == list(range(space.num_options))
    assert space.num_options == (3 + 2 + 2) * len(space.activation_widths)
    assert list(space.options) == sorted(space.options, key=lambda o: (o.layer, o.bits, o.activation_bits or 0))
    for layer, (first, last) in enumerate(itertools.pairwise(space.offsets)):
        assert space.options_of(layer) == range(first, last)
        assert space.candidates(layer) == tuple(tuple(option[1:]) for option in space.options[first:last])


@SPACES
@given(data=st.data())
def test_an_assignment_survives_its_options_and_its_json(space, data):
    assignment = data.draw(assignments(space, floats=True))
    assert space.assignment(space.chosen_options(assignment)) == assignment == space.completed(assignment)
    document = json.loads(json.dumps(space.to_json(assignment)))
    assert space.from_json(document) == assignment
    assert ("activation_bits" in document) == space.has_activations


@given(data=st.data())
def test_one_activation_width_goes_without_saying(data):
    plain = data.draw(assignments(FLOAT, floats=True))
    full = ONE.completed(plain)
    assert full.activation_bits == tuple(None if b is None else 8 for b in plain.bits)
    assert ONE.chosen_options(plain) == ONE.chosen_options(full) == FLOAT.chosen_options(plain)
    assert ONE.from_json(FLOAT.to_json(plain)) == full
    assert (ONE.size_bytes(plain), ONE.average_bits(plain)) == (FLOAT.size_bytes(plain), FLOAT.average_bits(plain))
    assert ONE.option(0, 4) == ONE.option(0, 4, 8)
    assert FLOAT.completed(Assignment(plain.bits, (None,) * 3)) == plain


@pytest.mark.parametrize(
    ("space", "assignment", "says"),
    [
        (FLOAT, Assignment((2, 4, 1), (8, 8, 8)), r"8-bit activations for a\.weight, but activations stay in float"),
        (ONE, Assignment((2, None, 1), (8, 8, 8)), r"8-bit activations for b\.weight, but the layer itself stays in float"),
        (ONE, Assignment((2, 4, 1), (8, 4, 8)), r"b\.weight has no candidate with 4-bit .* one of \[8\] bits"),
        (SEVERAL, Assignment((2, 4, 1)), r"no activation bits for a\.weight; expected one of \[4, 6, 8\]"),
        (SEVERAL, Assignment((2, 4, 1), (8, None, 4)), r"no activation bits for b\.weight"),
        (SEVERAL, Assignment((2, 4, 1), (8, 5, 4)), r"no candidate with 5-bit"),
        (SEVERAL, Assignment((2, 4, 8), (8, 8, 8)), r"c\.weight has no 8-bit candidate; its candidates are \[1, 16\]"),
        (SEVERAL, Assignment((2, 4), (8, 8)), "2 layers, the space 3"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused_with_what_would(space, assignment, says):
    with pytest.raises(ConfigurationError, match=says):
        space.chosen_options(assignment)


def test_an_option_of_several_activation_widths_needs_one():
    with pytest.raises(ConfigurationError, match=r"a\.weight has no activation bits; expected one of \[4, 6, 8\]"):
        SEVERAL.option(0, 4)
    with pytest.raises(ConfigurationError, match="its activations stay in float"):
        FLOAT.option(0, 4, 8)
    with pytest.raises(ConfigurationError, match="3 layers but activation bits for 2"):
        Assignment((2, 4, 1), (8, 8))


@pytest.mark.parametrize(("widths", "says"), [([8, 4], "ascending"), ([0], "1..16"), ([17], "1..16"), ([4, 4], "distinct")])
def test_activation_widths_are_ascending_integers_within_1_to_16(widths, says):
    with pytest.raises(ConfigurationError, match=f"activation_widths .*{says}"):
        SPACE.with_activations(widths)
    assert SEVERAL.with_activations([]) == FLOAT


def test_an_assignment_is_named_by_all_of_its_bits():
    plain = Assignment((2, 4, None))
    others = [Assignment((2, 4, None), (a, 8, None)) for a in (4, 8)] + [plain.with_corrections("none")]
    assert len({plain.key, *(other.key for other in others)}) == 4
    assert str(plain) == "2 4 float"
    assert str(Assignment((2, 4, None), (4, 8, None))) == "2/4 4/8 float"
    assert plain.replace(2, 8) == Assignment((2, 4, 8))
    assert plain.replace(2, 8, 4) == Assignment((2, 4, 8), (None, None, 4))
    assert SEVERAL.widest.replace(0, None) == Assignment((None, 8, 16), (None, 8, 8))


def test_ends_and_uniform_assignments_cross_the_activation_widths():
    assert (SEVERAL.narrowest, SEVERAL.widest) == (Assignment((2, 4, 1), (4,) * 3), Assignment((8, 8, 16), (8,) * 3))
    assert SEVERAL.chosen_options(SEVERAL.nothing) == []
    uniform = [(bits, assignment.activation_bits[0]) for bits, assignment in SEVERAL.uniform_assignments()]
    assert uniform == sorted(uniform)
    assert len(uniform) == 5 * 3
    assert list(ONE.uniform_assignments()) == [(b, ONE.completed(a)) for b, a in FLOAT.uniform_assignments()]


def test_restricting_and_tying_keep_the_activation_widths():
    for changed in (SEVERAL.restricted({"a.*": [8]}), SEVERAL.tied([])):
        assert changed.activation_widths == (4, 6, 8)


def test_labels_name_activations_only_where_they_are_quantized():
    assert FLOAT.label(1) == "a.weight at 4 bits"
    assert SEVERAL.label(SEVERAL.option(2, 16, 6)) == "c.weight at 16 bits, activations at 6"


@given(st.integers(1, 500), st.integers(1, 16))
def test_a_tensor_takes_the_bytes_of_its_bit_stream(num_weights, bits):
    size = Layer("w", (num_weights,), "linear").weight_bytes(bits)
    assert 8 * (size - 1) < num_weights * bits <= 8 * size


def test_size_and_average_bits_are_sums_over_layers():
    assignment = Assignment((2, 4, 16))
    assert SPACE.size_bytes(assignment) == 4 + 18 + 14  # ceil(30 / 8), 36 * 4 / 8, 7 * 16 / 8
    assert SPACE.average_bits(assignment) == (15 * 2 + 36 * 4 + 7 * 16) / 58


def test_a_layer_left_in_float_counts_32_bits():
    assert SPACE.size_bytes(SPACE.nothing) == 4 * 58


def test_uniform_takes_the_nearest_candidate_where_a_layer_lacks_the_width():
    assert dict(SPACE.uniform_assignments())[2] == Assignment((2, 4, 1))


def test_restricting_by_pattern_pins_layers_and_refuses_a_pattern_without_match():
    assert SPACE.restricted({"a.*": [8]}).bit_widths[0] == (8,)
    with pytest.raises(ConfigurationError, match="matches 'z"):
        SPACE.restricted({"z*": [8]})


SAME = ((2, 4),) * 3


@pytest.mark.parametrize(
    ("widths", "ties", "says"),
    [
        (SPACE.bit_widths, ((0, 1),), "different bit-widths"),
        (SAME, ((0, 1), (1, 2)), "another tie"),
        (SAME, ((0, 0),), "two different layers"),
        (SAME, ((1,),), "two different layers"),
        (SAME, ((0, -1),), r"numbers within 0\.\.2"),
        (SAME, ((0, 3),), r"numbers within 0\.\.2"),
    ],
)
def test_ties_need_equal_candidates_and_no_layer_twice(widths, ties, says):
    with pytest.raises(ConfigurationError, match=says):
        SearchSpace(LAYERS, widths, ties)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SPACE.tied(["a.*"]), r"a tie is 'a\.\*'; expected a list"),
        (lambda: SPACE.blocked(["a.*"]), r"a block is 'a\.\*'; expected a list"),
        (lambda: SPACE.restricted({"a.*": 8}), "is 8; expected a list of integers"),
        (lambda: SearchSpace.uniform(LAYERS, 8), "bits is 8; expected a list of integers"),
        (lambda: SearchSpace.uniform(LAYERS, "248"), "bits is '248'; expected a list of integers"),
    ],
)
def test_one_value_in_the_place_of_a_list_is_refused(call, says):
    with pytest.raises(ConfigurationError, match=says):
        call()


def test_bits_may_be_numpys_integers():
    assert SearchSpace.uniform(LAYERS, np.array([2, 4])).bit_widths == ((2, 4),) * 3


def test_a_foreign_assignment_is_refused_with_the_names():
    with pytest.raises(ConfigurationError, match=r"adds \['z'\]"):
        ONE.from_json({**ONE.to_json(ONE.widest), "activation_bits": {"z": 8}})
    with pytest.raises(ConfigurationError, match="activation_bits is 8; expected an object"):
        ONE.from_json({**ONE.to_json(ONE.widest), "activation_bits": 8})
    document = SPACE.to_json(SPACE.widest)
    document["bits"] = {**document["bits"], "z.weight": 4}
    del document["bits"]["a.weight"]
    with pytest.raises(ConfigurationError, match=r"a\.weight.*z\.weight"):
        SPACE.from_json(document)
