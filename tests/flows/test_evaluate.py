"""Evaluation of images that are decoded: one pass for many assignments, and what a killed one counted is kept."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clado.criteria.kl_to_float import kl_to_float
from clado.data.decoding import Preprocessing
from clado.evaluation import Counts, evaluation_batches
from clado.run import evaluation
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.space import CORRECTED, RECONSTRUCTED, Assignment
from flows.commands import stored
from flows.phases.evaluate import evaluate
from tests.data.test_imagenet import MAKE, SHAPE, SYNSETS, jpeg
from tests.running import config
from tests.tolerance import assert_close_losses, of_no_change

AT_MOST, VALIDATED = 4, 10
RANGES = [(0, 3), (3, 6), (6, 10)]
"""Ten images in as many evaluation batches of at most four as are needed, as even as integers allow."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenedRun:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "task_images", lambda macs, num_images: AT_MOST)
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
    return evaluate(run, workers, [SimpleNamespace(assignment=answer, method="chosen") for answer in ANSWERS])


def test_every_image_is_decoded_once_for_all_assignments_and_the_sums_are_those_of_one_pass(
    run: OpenedRun, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers()
    actual = evaluated(run, workers)
    assert len(decoded) == len(set(decoded)) == VALIDATED
    assert run.evaluation.batches == RANGES
    assert [(number, len(group)) for number, group in workers.made] == [
        (0, 4),
        (1, 4),
        (2, 4),
    ]  # three answers, and the float one
    for assignment, counts in actual.items():
        [whole] = run.evaluation.accuracies([assignment], 0, VALIDATED)
        assert (counts.num_images, counts.top1, counts.top5, counts.classes) == (VALIDATED, whole.top1, whole.top5, whole.classes)
        assert_close_losses(counts.loss, whole.loss, VALIDATED)
    again = Workers()
    assert evaluated(run, again) == actual
    assert again.made == []


@pytest.mark.parametrize("lifetime", [0, 1, 2])
def test_a_killed_evaluation_keeps_what_it_counted(run: OpenedRun, decoded: list[str], lifetime: int) -> None:
    with pytest.raises(Killed):
        evaluated(run, Workers(lifetime))
    assert len(decoded) == sum(stop - start for start, stop in RANGES[:lifetime])
    rest = Workers()
    actual = evaluated(run, rest)
    assert len(rest.made) == 3 - lifetime
    assert len(decoded) == VALIDATED
    for file in (run.folder / "evaluations" / "validation" / "parts").glob("*"):
        raise AssertionError(f"{file} is left behind")
    for assignment, counts in actual.items():
        parts = [run.evaluation.accuracies([assignment], *batch)[0] for batch in RANGES]
        assert counts == sum(parts, Counts())


def test_what_one_command_counts_leaves_what_a_killed_run_counted_of_others(run: OpenedRun, decoded: list[str]) -> None:
    with pytest.raises(Killed):
        evaluated(run, Workers(1))
    stored.counts_of(run, ANSWERS[0])
    rest = Workers()
    evaluated(run, rest)
    assert [(number, len(group)) for number, group in rest.made] == [(1, 3), (2, 3)]


def test_counts_are_the_same_bit_for_bit_for_any_number_of_workers_in_any_order(run: OpenedRun) -> None:
    items = [(number, tuple(ANSWERS)) for number in range(len(RANGES))]
    alone = run.evaluation.validation_counts(ANSWERS, lambda items: map(run.evaluation.count_batch, items))
    others = [replace(run, config=run.config.model_copy(update={"folder": run.folder.with_name(f"run{k}")})) for k in range(2)]

    def count_batches(task: Any) -> Any:
        assert task == items
        for k, item in enumerate(reversed(task)):
            yield others[k % 2].evaluation.count_batch(item)

    assert others[0].evaluation.validation_counts(ANSWERS, count_batches) == alone


@pytest.mark.parametrize("num_images", [1, 31, 100, 616, 5000, 10_000, 50_000])
@pytest.mark.parametrize("macs", [10**6, 31 * 10**6, 385 * 10**6, 4 * 10**9])
def test_tasks_are_even_neither_tiny_nor_huge_and_few(num_images: int, macs: int) -> None:
    batches = evaluation_batches(num_images, evaluation.task_images(macs, num_images))
    sizes = [stop - start for start, stop in batches]
    assert sum(sizes) == num_images
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= evaluation.MAX_TASK_IMAGES
    assert min(sizes) > evaluation.MIN_TASK_IMAGES // 2 or len(batches) == 1
    assert len(batches) <= 2 * evaluation.MAX_TASKS
    if 4 * num_images * macs >= 100 * evaluation.TASK_MACS and num_images >= 10 * evaluation.MAX_TASK_IMAGES:
        assert len(batches) >= 10  # enough for two workers to end within a tenth of each other


def test_images_that_measure_and_that_decide_are_decoded_once_in_a_process(run: OpenedRun, decoded: list[str]) -> None:
    losses = [run.evaluation.loss(answer) for answer in (*ANSWERS, *ANSWERS)]
    assert len(decoded) == len(set(decoded)) == len(run.decision)
    assert losses[:3] == losses[3:]
    for block in (*range(len(run.sample_blocks)), 0):
        run.evaluation.bench.loaded(block)
    assert len(decoded) == len(set(decoded)) == len(run.decision) + len(run.slices.sensitivity)


CORRECTIONS = [(), ("output_statistics",), ("batchnorm_reestimation",), ("output_statistics", "batchnorm_reestimation")]


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=["none", "static", "final", "both"])
def test_assignments_that_deploy_the_same_network_are_measured_once_and_others_are_not_confused(
    tmp_path: Path, corrections: tuple[str, ...]
) -> None:
    reduced = {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 32, "validation_images": 8}
    run = open_run(parse_config(config(tmp_path / "run", data=reduced, corrections=corrections)))
    levels = [level for level in CORRECTED if level not in RECONSTRUCTED] if corrections else ["all"]
    every = [a.with_corrections(level) for a in (run.space.narrowest, run.space.nothing) for level in levels]
    measured: list[Assignment] = []

    def measure(absent: Any) -> Any:
        measured.extend(absent)
        return [(assignment, run.evaluation.loss(assignment)) for assignment in absent]

    actual = run.evaluation.losses(every, measure)
    assert actual == {assignment: run.evaluation.loss(assignment) for assignment in every}
    assert len(measured) == len({counts.loss for counts in actual.values()})
    final = 32 if "batchnorm_reestimation" in corrections else 0
    levels_images = {a.corrected: run.evaluation.loss_images(a) for a in map(run.evaluation.representative, every)}
    assert set(levels_images.items()) <= {("all", len(run.decision) + final), *((a, len(run.decision)) for a in CORRECTED[1:])}
    others = run.evaluation.other_corrections(run.space.narrowest)
    assert {*others, run.space.narrowest} == {a for a in measured if a.bits == run.space.narrowest.bits}


@pytest.mark.parametrize("statistics", [False, True])
def test_a_loss_is_against_the_float_network_also_where_probes_use_batch_statistics(tmp_path: Path, statistics: bool) -> None:
    reduced = {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 32, "validation_images": 8}
    measuring = {"batch_statistics": statistics, "batch_images": 3}
    run = open_run(parse_config(config(tmp_path / "run", data=reduced, measure=measuring)))
    assert run.evaluation.loss(run.space.nothing).loss == pytest.approx(0, abs=8 * of_no_change())
    x, _ = run.decision.load(0, 8)
    network, layers = run.preparation.deployed(run.space.narrowest)
    expected = float(kl_to_float(network.logits(x, layers), run.float_network.logits(x)).sum())
    assert_close_losses(run.evaluation.loss(run.space.narrowest).loss, expected, 8)


def test_the_command_reads_the_same_counts_and_writes_each_class(run: OpenedRun, decoded: list[str]) -> None:
    with pytest.raises(Killed):
        evaluated(run, Workers(1))
    counts = stored.counts_of(run, ANSWERS[0])
    assert len(decoded) == VALIDATED  # three before, seven now
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
