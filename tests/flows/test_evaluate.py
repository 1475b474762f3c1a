"""Evaluation of images that are decoded: one pass for many assignments, and what a killed one counted is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clado.data.decoding import Preprocessing
from clado.evaluation import Counts
from clado.run import evaluation
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.space import Assignment
from flows.commands import stored
from flows.phases.evaluate import evaluate
from tests.data.test_imagenet import MAKE, SHAPE, SYNSETS, jpeg
from tests.running import config
from tests.tolerance import assert_close_losses

SHARD, VALIDATED = 4, 10


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenedRun:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", SHARD)
    (tmp_path / "network_to_evaluate.py").write_text(MAKE)
    for c, synset in enumerate(SYNSETS[:2]):
        (tmp_path / "photos" / synset).mkdir(parents=True)
        for k in range(6):
            (tmp_path / "photos" / synset / f"{k:02}.JPEG").write_bytes(jpeg(c * 6 + k))
    data = {"source": "folder", "path": "photos", "sensitivity_images": 2, "calibration_images": 0, "sample_blocks": 1}
    network = {"source": "factory", "name": "network_to_evaluate:make", "image_shape": SHAPE}
    return open_run(parse_config(config(tmp_path / "run", network=network, data=data, corrections=[])))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    plain = Preprocessing.__call__

    def counted(self: Preprocessing, encoded: Any) -> Any:
        names.append(encoded.name)
        return plain(self, encoded)

    monkeypatch.setattr(Preprocessing, "__call__", counted)
    return names


class Killed(Exception):
    pass


class Workers:
    """Runs tasks here, and dies after some of them."""

    def __init__(self, lifetime: int = 1000) -> None:
        self.lifetime, self.made = lifetime, []

    def map(self, function: Any, settings: Any, items: Any) -> Any:
        for item in items:
            if len(self.made) == self.lifetime:
                raise Killed
            self.made.append(item)
            yield function(settings.model_dump(mode="json"), item)


ANSWERS = [Assignment((2, 4, 2)), Assignment((4, 4, 4)), Assignment((2, 2, 2))]


def evaluated(run: OpenedRun, workers: Workers) -> dict[Assignment, Counts]:
    return evaluate(run, workers, [SimpleNamespace(assignment=answer) for answer in ANSWERS])


def test_every_image_is_decoded_once_for_all_assignments_and_the_sums_are_those_of_one_pass(
    run: OpenedRun, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers()
    found = evaluated(run, workers)
    assert len(decoded) == len(set(decoded)) == VALIDATED
    assert [(shard, len(group)) for shard, group in workers.made] == [(0, 4), (1, 4), (2, 4)]  # three answers, and the float one
    for assignment, counts in found.items():
        [whole] = run.evaluation.accuracies([assignment], 0, VALIDATED)
        assert (counts.num_images, counts.top1, counts.top5, counts.classes) == (VALIDATED, whole.top1, whole.top5, whole.classes)
        assert_close_losses(counts.loss, whole.loss, VALIDATED)
    again = Workers()
    assert evaluated(run, again) == found
    assert again.made == []


@pytest.mark.parametrize("lifetime", [0, 1, 2])
def test_a_killed_evaluation_keeps_what_it_counted(run: OpenedRun, decoded: list[str], lifetime: int) -> None:
    with pytest.raises(Killed):
        evaluated(run, Workers(lifetime))
    assert len(decoded) == lifetime * SHARD
    rest = Workers()
    found = evaluated(run, rest)
    assert len(rest.made) == 3 - lifetime
    assert len(decoded) == VALIDATED
    for file in (run.folder / "evaluations" / "validation" / "parts").glob("*"):
        raise AssertionError(f"{file} is left behind")
    for assignment, counts in found.items():
        parts = [run.evaluation.accuracies([assignment], start, min(start + SHARD, VALIDATED))[0] for start in (0, 4, 8)]
        assert counts == sum(parts, Counts())


def test_the_command_reads_the_same_counts_and_writes_each_class(run: OpenedRun, decoded: list[str]) -> None:
    with pytest.raises(Killed):
        evaluated(run, Workers(1))
    counts = stored.counts_of(run, ANSWERS[0])
    assert len(decoded) == VALIDATED  # four before, six now
    assert stored.counts_of(run, ANSWERS[0]) == counts
    row = SimpleNamespace(budget="3 bits", method="chosen", assignment=ANSWERS[0])
    lines = stored.per_class_csv(run, [row]).splitlines()
    assert lines[0] == "budget,method,class,name,images,top1_hits,top1"
    for method in ("float", "chosen"):
        cells = [line.split(",") for line in lines[1:] if line.split(",")[1] == method]
        assert [(int(cell[2]), cell[3]) for cell in cells] == [(7, SYNSETS[0]), (27, SYNSETS[1])]
        assert sum(int(cell[4]) for cell in cells) == VALIDATED
    hits = [int(line.split(",")[5]) for line in lines[1:] if ",chosen," in line]
    assert sum(hits) == counts.top1
