"""Laws of what can be chosen: sizes are integers of the packed bits, options and assignments translate into one another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clado.errors import ConfigurationError
from clado.space import Assignment, Layer, SearchSpace, check_bits

LAYERS = (Layer("a.weight", (3, 5), "linear"), Layer("b.weight", (2, 2, 3, 3), "conv2d"), Layer("c.weight", (7,), "linear"))
SPACE = SearchSpace(LAYERS, ((2, 4, 8), (4, 8), (1, 16)))


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


def test_options_number_every_layer_and_bit_width_once():
    assert [SPACE.option(layer, bits) for layer, bits in SPACE.options] == list(range(SPACE.num_options))
    assert SPACE.num_options == 3 + 2 + 2


@given(st.tuples(*[st.sampled_from(bits) for bits in SPACE.bit_widths]))
def test_an_assignment_survives_its_options_and_its_json(bits):
    assignment = Assignment(bits)
    assert SPACE.assignment(SPACE.chosen_options(assignment)) == assignment
    assert SPACE.from_json(SPACE.to_json(assignment)) == assignment


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


@pytest.mark.parametrize(("ties", "says"), [(((0, 1),), "different bit-widths"), (((0, 0), (0,)), "another tie")])
def test_ties_need_equal_candidates_and_no_layer_twice(ties, says):
    with pytest.raises(ConfigurationError, match=says):
        SearchSpace(LAYERS, SPACE.bit_widths, ties)


def test_a_foreign_assignment_is_refused_with_the_names():
    document = SPACE.to_json(SPACE.widest)
    document["bits"] = {**document["bits"], "z.weight": 4}
    del document["bits"]["a.weight"]
    with pytest.raises(ConfigurationError, match=r"a\.weight.*z\.weight"):
        SPACE.from_json(document)
