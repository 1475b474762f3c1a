"""Laws of the evaluation cache: what was evaluated is known, whole, and only under the settings it was evaluated under."""

import json

import pytest

from clado.evaluation import Counts
from clado.space import Assignment
from clado.storage.evaluation_cache import EvaluationCache

ACTIVATED = Assignment((2, 4, 8), (8, 4, 8))
ONE, OTHER, PARTIAL = Assignment((2, 4, 8)), Assignment((2, 8, 4)), Assignment((2, None, 8))
COUNTS = Counts(7, 0.1 + 0.2, 5, 6, ((0, 3, 2), (9, 4, 3)))


@pytest.mark.parametrize("assignment", [ONE, ACTIVATED, PARTIAL, Assignment((None, None, None))])
@pytest.mark.parametrize(
    "counts", [COUNTS, Counts(3, 1e-300), Counts(2, float("inf"), 0, 0), Counts(2, 0.6, briers=(0.333333, 0.1), hits="01")]
)
def test_what_is_put_is_got_bit_for_bit(tmp_path, assignment, counts):
    EvaluationCache(tmp_path / "evaluations", "abc").put(assignment, counts)
    assert EvaluationCache(tmp_path / "evaluations", "abc").get(assignment) == counts


def test_each_assignment_has_one_file_and_the_last_word_counts(tmp_path):
    cache = EvaluationCache(tmp_path, "abc")
    for assignment in (ONE, OTHER, PARTIAL, ACTIVATED, ONE):
        cache.put(assignment, Counts(1))
        cache.put(assignment, COUNTS)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("identity", "assignment"),
    [("abc", OTHER), ("abc", ACTIVATED), ("abc", PARTIAL), ("def", ONE), ("0123456789ab-another-tail", ONE), ("", ONE)],
)
def test_nothing_else_is_known(tmp_path, identity, assignment):
    EvaluationCache(tmp_path, "abc").put(ONE, COUNTS)
    EvaluationCache(tmp_path, "0123456789ab-one-tail").put(ONE, COUNTS)  # its file has the name of the fourth case's
    assert EvaluationCache(tmp_path, identity).get(assignment) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"identity": "abc", "bits": [2, 4, 8]}', "\x00"])
def test_a_file_that_cannot_be_read_is_evaluated_again(tmp_path, content):
    cache = EvaluationCache(tmp_path, "abc")
    cache.put(ONE, COUNTS)
    next(tmp_path.iterdir()).write_text(content)
    assert cache.get(ONE) is None
    cache.put(ONE, COUNTS)
    assert cache.get(ONE) == COUNTS


def test_activation_bits_are_told_apart_even_in_one_file(tmp_path):
    cache = EvaluationCache(tmp_path, "abc")
    cache.put(ONE, COUNTS)
    plain = next(tmp_path.iterdir())
    cache.put(ACTIVATED, COUNTS)
    other = next(file for file in tmp_path.iterdir() if file != plain)
    other.write_text(plain.read_text())
    assert cache.get(ACTIVATED) is None


@pytest.mark.parametrize("counts", [{"num_images": 1, "right": 3}, [], None])
def test_counts_of_another_shape_are_evaluated_again(tmp_path, counts):
    cache = EvaluationCache(tmp_path, "abc")
    cache.put(ONE, COUNTS)
    file = next(tmp_path.iterdir())
    file.write_text(json.dumps({**json.loads(file.read_text()), "counts": counts}))
    assert cache.get(ONE) is None


def test_counts_of_evaluation_batches_are_kept_a_file_each_until_they_are_forgotten(tmp_path):
    cache = EvaluationCache(tmp_path, "abc")
    first = {ONE.key: COUNTS, OTHER.key: Counts(2, 1e-300)}
    cache.put_batch((0, 7), first)
    cache.put_batch((7, 8), {ONE.key: Counts(1)})
    assert (cache.get_batch((0, 7)), cache.get_batch((7, 8)), cache.get_batch((0, 8))) == (first, {ONE.key: Counts(1)}, {})
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert EvaluationCache(tmp_path, "def").get_batch((0, 7)) == {}
    assert cache.get(ONE) is None
    cache.put(ONE, COUNTS)
    cache.forget_batches([ONE])
    assert cache.get(ONE) == COUNTS
    assert (cache.get_batch((0, 7)), cache.get_batch((7, 8))) == ({OTHER.key: first[OTHER.key]}, {})
    cache.forget_batches([OTHER])
    assert list((tmp_path / "parts").iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"identity": "abc", "counts": 3}', "\x00"])
def test_a_file_of_an_evaluation_batch_that_cannot_be_read_is_counted_again(tmp_path, content):
    cache = EvaluationCache(tmp_path, "abc")
    cache.put_batch((0, 7), {ONE.key: COUNTS})
    next((tmp_path / "parts").iterdir()).write_text(content)
    assert cache.get_batch((0, 7)) == {}


def counts_of(assignment: Assignment) -> tuple[Assignment, Counts]:
    return assignment, Counts(1, float(sum(bits or 0 for bits in assignment.bits)))


def test_counts_are_read_where_they_are_known_and_kept_where_they_are_measured(tmp_path):
    cache, requests, done = EvaluationCache(tmp_path, "identity"), [], []

    def measure(absent):
        requests.append(list(absent))
        return map(counts_of, reversed(absent))  # workers end in any order

    cache.put(*counts_of(ACTIVATED))
    counts = cache.read_or_measure([ONE, ACTIVATED, ONE, PARTIAL], measure, done.append)
    assert requests == [[ONE, PARTIAL]]
    assert list(counts.items()) == [counts_of(assignment) for assignment in (ONE, ACTIVATED, PARTIAL)]
    assert done == [ACTIVATED, PARTIAL, ONE]
    assert cache.read_or_measure([PARTIAL, ONE], measure) == dict(map(counts_of, (PARTIAL, ONE)))
    assert requests[1:] == [[]]


def test_what_was_measured_before_a_fault_is_kept(tmp_path):
    cache = EvaluationCache(tmp_path, "identity")

    def dying(absent):
        yield counts_of(absent[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.read_or_measure([ONE, ACTIVATED], dying)
    assert cache.get(ONE) == counts_of(ONE)[1]
    assert cache.get(ACTIVATED) is None
