"""The evaluations of a run: losses on the decision set, accuracies on the validation set. Known ones are read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from clado.evaluation import Counts, count_each, evaluation_batches, to_six_digits
from clado.measuring.kinds import tile_kind
from clado.measuring.scores import score_passes
from clado.measuring.workbench import FLOAT_LOGITS_BYTES, Pass, Workbench
from clado.network.network import Network
from clado.quantization.corrections import FinalCorrection, at_stage
from clado.quantization.preparation import Prepared
from clado.run.identity import RunIdentity
from clado.run.inputs import RunInputs
from clado.run.preparation import RunPreparation
from clado.settings.identity import fingerprint
from clado.space import CORRECTED, RECONSTRUCTED, Assignment
from clado.storage.evaluation_cache import EvaluationCache

TASK_MACS = 10**10
"""Multiply-accumulates of one assignment in one task: half a second of one core, and much more than deploying takes."""
MIN_TASK_IMAGES, MAX_TASK_IMAGES = 32, 512
MAX_TASKS = 200
"""Evaluation batches of a set of images, if MAX_TASK_IMAGES allow it: enough for many workers, but few files."""
BatchItem = tuple[int, tuple[Assignment, ...]]
"""The number of an evaluation batch, and the assignments that are counted on it."""
BatchCounts = tuple[int, list[tuple[Assignment, Counts]]]
"""The number of an evaluation batch, and the counts of each assignment on it."""


class RunEvaluation:
    """Evaluates assignments of a run, and measures tiles of it."""

    def __init__(self, inputs: RunInputs, identity: RunIdentity, preparation: RunPreparation) -> None:
        self.inputs = inputs
        self.identity = identity
        self.preparation = preparation
        self._float_logits: dict[int, Tensor] = {}  # a pass over the decision set, by its first image

    @cached_property
    def bench(self) -> Workbench:
        """The workbench of measuring."""
        return self.workbench(self.preparation.corrected)

    @cached_property
    def plain_bench(self) -> Workbench:
        """The same with layers that are rounded to nearest, without corrections."""
        return self.workbench(self.preparation.plain)

    def bench_of(self, kind: str) -> Workbench:
        """The workbench for a kind of tile."""
        return self.plain_bench if tile_kind(kind).is_uncorrected else self.bench

    def workbench(self, prepared: Prepared) -> Workbench:
        """The workbench for a prepared network on the sensitivity set."""
        inputs, config = self.inputs, self.inputs.config
        return Workbench(
            prepared,
            config.criterion,
            inputs.sample_blocks,
            inputs.slices.sensitivity.load,
            config.measure.batch_images,
            inputs.configured_limit,
            config.measure.batch_statistics,
            config.gradients.vectors,
            config.gradients.seed,
        )

    @property
    def batch_images(self) -> int:
        """Images of one forward pass of an evaluation."""
        return self.inputs.config.measure.batch_images or self.inputs.float_network.images_at_once

    def loss(self, assignment: Assignment) -> Counts:
        """The sum of losses of the deployed network over the decision set, and the Brier score and hit of each image.

        Without classes it is only the loss of each image.
        """
        network, layers = self.preparation.deployed(assignment)
        scores = score_passes(self.inputs.config.criterion, *network.folded_with(layers), self._passes())
        counts = Counts(len(scores.losses), float(scores.losses.sum()), briers=to_six_digits(scores.losses))
        if scores.briers is None or scores.hits is None:
            return counts
        hits = "".join("01"[int(hit)] for hit in scores.hits)
        return replace(counts, briers=to_six_digits(scores.briers), hits=hits)

    def _passes(self) -> Iterator[Pass]:
        """The decision set with its float logits, in batches that are fast."""
        images, device = self.inputs.decision, self.inputs.float_network.device
        for start, stop in evaluation_batches(len(images), self.batch_images):
            x, labels = images.load(start, stop)
            x, labels = x.to(device), None if labels is None else labels.to(device)
            logits = self._float_logits.get(start)
            if logits is None:
                logits = self._folded_float.logits(x)
                if logits.nbytes * len(images) <= FLOAT_LOGITS_BYTES * len(x):
                    self._float_logits[start] = logits
            yield Pass(x, labels, logits)

    @cached_property
    def _folded_float(self) -> Network:
        """The float network that is deployed if nothing is quantized."""
        return self.preparation.corrected.network.folded()[0]

    @cached_property
    def _representative_levels(self) -> dict[str, str]:
        """Maps each of `CORRECTED` to the one that represents it, because both deploy the same network."""
        corrections = self.inputs.config.corrections
        has_final = self.preparation.images_per_reestimation > 0
        has_static = len(corrections) > len(at_stage(corrections, FinalCorrection))
        none = "none" if has_final or has_static else "all"
        static = "static" if has_final and has_static else none if has_final else "all"
        return {"all": "all", "static": static, "none": none, **{effort: effort for effort in RECONSTRUCTED}}

    def representative(self, assignment: Assignment) -> Assignment:
        """The assignment that represents all those that deploy the same network. Only it is evaluated."""
        level = "all" if assignment.is_float else self._representative_levels[assignment.corrected]
        return assignment.with_corrections(level)

    def other_corrections(self, assignment: Assignment) -> list[Assignment]:
        """The same bits with other corrections, which deploy other networks. None of them is reconstructed."""
        deployed_as = self.representative(assignment)
        levels = [level for level in dict.fromkeys(self._representative_levels.values()) if level not in RECONSTRUCTED]
        return [other for level in levels if (other := assignment.with_corrections(level)) != deployed_as]

    def loss_images(self, representative: Assignment) -> int:
        """Forward images that measuring a loss takes: the decision set, and those of final corrections."""
        images = len(self.inputs.decision)
        return images + (self.preparation.images_per_reestimation if representative.corrected == "all" else 0)

    def losses(
        self,
        assignments: Iterable[Assignment],
        measure: Callable[[Sequence[Assignment]], Iterable[tuple[Assignment, Counts]]],
        done: Callable[[Assignment], None] = lambda assignment: None,
    ) -> dict[Assignment, Counts]:
        """Counts of each distinct assignment on the decision set: read if they are known, else measured and kept.

        Args:
            assignments: What to count.
            measure: Computes `loss` of missing assignments, in any order. It gets the slowest ones first.
            done: Called with the representative of each, as soon as its counts are known.
        """

        def measured(absent: Sequence[Assignment]) -> Iterable[tuple[Assignment, Counts]]:
            return measure(sorted(absent, key=lambda assignment: CORRECTED.index(assignment.corrected)))

        return self._of_representatives(
            assignments, lambda distinct: self.cache("decision").read_or_measure(distinct, measured, done)
        )

    def _of_representatives(
        self,
        assignments: Iterable[Assignment],
        counts_of: Callable[[Iterable[Assignment]], dict[Assignment, Counts]],
    ) -> dict[Assignment, Counts]:
        """The counts of each assignment, from those of `counts_of`, which covers each deployed network once."""
        representatives = {assignment: self.representative(assignment) for assignment in assignments}
        counts = counts_of(representatives.values())
        return {assignment: counts[one] for assignment, one in representatives.items()}

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Evaluation batches of the validation set. One Dask task counts all assignments on one of them."""
        num_images = len(self.inputs.slices.validation)
        return evaluation_batches(num_images, task_images(self.inputs.float_network.macs, num_images))

    def accuracies(self, assignments: Iterable[Assignment], start: int, stop: int) -> list[Counts]:
        """Counts of every deployed assignment on images start..stop−1 of the validation set. Each image is decoded once."""
        float_network, validation = self.inputs.float_network, self.inputs.slices.validation
        variants = (
            (float_network, {}) if assignment.is_float else self.preparation.deployed(assignment) for assignment in assignments
        )
        return count_each(variants, validation, start, stop, self.batch_images, float_network, self.inputs.judge)

    def count_batch(self, item: BatchItem) -> BatchCounts:
        """Counts of assignments on one evaluation batch. The images are decoded once."""
        number, assignments = item
        counts = self.accuracies(assignments, *self.batches[number])
        return number, list(zip(assignments, counts, strict=True))

    def cache(self, which: str) -> EvaluationCache:
        """Evaluations on the decision set (`decision`) or on the `validation` set, of deployed networks."""
        images = self.inputs.decision if which == "decision" else self.inputs.slices.validation
        identity = {**self.identity.document, "slice": images.sha256}
        config = self.inputs.config
        if config.effort != "fast" and not config.corrections and not config.activations.bits:
            identity["calibration_set"] = self.inputs.slices.calibration.sha256  # else it is in the document
        if which == "validation" and self.inputs.config.metric is not None:
            identity["metric"] = self.inputs.config.metric
        return EvaluationCache(self.inputs.folder / "evaluations" / which, fingerprint(identity))

    def validation_counts(
        self, assignments: Iterable[Assignment], count_batches: Callable[[list[BatchItem]], Iterable[BatchCounts]]
    ) -> dict[Assignment, Counts]:
        """Counts of each distinct assignment on the validation set: read if they are known, else counted and kept.

        Args:
            assignments: What to count.
            count_batches: Computes `count_batch` of each missing item, in any order.
        """
        cache, batches = self.cache("validation"), self.batches

        def counted(absent: Sequence[Assignment]) -> Iterator[tuple[Assignment, Counts]]:
            parts = [cache.get_batch(batch) for batch in batches]
            items = [
                (number, missing)
                for number, known in enumerate(parts)
                if (missing := tuple(assignment for assignment in absent if assignment.key not in known))
            ]
            for number, batch_counts in count_batches(items):
                parts[number] |= {assignment.key: counts for assignment, counts in batch_counts}
                if len(batches) > 1:
                    cache.put_batch(batches[number], parts[number])
            for assignment in absent:
                # batches are added in order, so that the sum does not depend on the order of the workers
                yield assignment, sum((known[assignment.key] for known in parts), Counts())
            cache.forget_batches(absent)

        return self._of_representatives(assignments, lambda distinct: cache.read_or_measure(distinct, counted))


def task_images(macs: int, num_images: int) -> int:
    """Images of one evaluation batch, for a network of so many multiply-accumulates and a set of so many images.

    It does not depend on the workers, so the sums are the same, bit for bit, for any number of workers.
    """
    images = max(TASK_MACS // max(1, macs), num_images // MAX_TASKS)
    return min(max(images, MIN_TASK_IMAGES), MAX_TASK_IMAGES)
