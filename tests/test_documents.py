"""Results that are written are read again as they were, by str or Path; anything else is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import clado
from clado.errors import StoreError
from clado.records.documents import space_document, space_of
from clado.records.run_record import RunRecord
from tests.synthetic import make_matrix, make_record, make_space

SPACE = (
    make_space(8)
    .restricted({"conv1.weight": (4, 8)})
    .tied([["layer1.0.conv1.weight", "layer2.0.conv1.weight"]])
    .with_activations((4, 8))
    .blocked([["layer3.*", "layer4.0.*"]])
)
MATRIX = replace(
    make_matrix(SPACE),
    standard_error=np.abs(make_matrix(SPACE, seed=1).values),
    quarantined=(3,),
    forbidden=((5, 9), (6, 9)),
    ranking_only=True,
    baseline=0.125,
)
SOLUTION = clado.solve(make_matrix(make_space(8)), average_bits=3, solver="exhaustive")
RESULTS = {
    "solution": SOLUTION,
    "heuristic": clado.solve(make_matrix(SPACE), average_bits=3.5, solver="greedy"),
    "front": clado.front(make_matrix(SPACE), size_bytes=(200_000, 300_000), solver="greedy"),
    "record": make_record(8),
}
CLASSES = {
    "matrix": clado.InteractionMatrix,
    "solution": clado.Solution,
    "heuristic": clado.Solution,
    "front": clado.Front,
    "record": RunRecord,
}


def test_a_space_is_the_same_again():
    assert space_of(space_document(SPACE)) == SPACE
    assert space_of(space_document(make_space())) == make_space()


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("matrix", [MATRIX, make_matrix(make_space(4))], ids=["all", "least"])
def test_a_matrix_is_the_same_again(matrix, kind, tmp_path):
    matrix.save(kind(tmp_path / "new" / "m.npz"))
    loaded = clado.InteractionMatrix.load(kind(tmp_path / "new" / "m.npz"))
    assert loaded.values.tobytes() == matrix.values.tobytes()
    assert (loaded.standard_error is None) == (matrix.standard_error is None)
    assert matrix.standard_error is None or np.array_equal(loaded.standard_error, matrix.standard_error)
    arrays = {"values": None, "standard_error": None}
    assert vars(replace(loaded, values=matrix.values, standard_error=None)) | arrays == vars(matrix) | arrays


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_the_same_again(name, kind, tmp_path):
    RESULTS[name].save(kind(tmp_path / "new" / "r.json"))
    assert CLASSES[name].load(kind(tmp_path / "new" / "r.json")) == RESULTS[name]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": "clado-store/2"}', b'{"format": "clado-solution/1"}'])
def test_another_file_is_refused(name, content, tmp_path):
    file = tmp_path / "r"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{file}.*(expected|run `clado run`)"):
        CLASSES[name].load(str(file))


def test_a_matrix_of_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", values=np.eye(3))
    with pytest.raises(StoreError, match="document"):
        clado.InteractionMatrix.load(tmp_path / "m.npz")
