"""The evaluations of a run: losses on the sensitivity set, accuracies on the validation set, each read where it is known."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

from clado.data.images import MemorySlice
from clado.evaluation import Counts, count_each, evaluation_batches
from clado.measuring.kinds import tile_kind
from clado.measuring.scores import Scores, deployed_scores, scores
from clado.measuring.workbench import Workbench
from clado.quantization.corrections import FinalCorrection, at_stage
from clado.quantization.preparation import Prepared
from clado.run.identity import RunIdentity
from clado.run.inputs import RunInputs
from clado.run.preparation import RunPreparation
from clado.settings.identity import fingerprint
from clado.space import Assignment
from clado.storage.evaluation_cache import EvaluationCache

EVALUATION_BATCH = 2500  # validation images of one Dask task
ASSIGNMENTS_AT_ONCE = 8  # assignments: decoding is then an eighth as much, and their weights still fit into memory
Variant = Literal["deployed", "probe_model"]
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

    @cached_property
    def bench(self) -> Workbench:
        """What measuring needs."""
        return self.workbench(self.preparation.corrected)

    @cached_property
    def plain_bench(self) -> Workbench:
        """The same with layers that are rounded to nearest, without corrections."""
        return self.workbench(self.preparation.plain)

    def bench_of(self, kind: str) -> Workbench:
        """What measuring a kind of tile needs."""
        return self.plain_bench if tile_kind(kind).is_uncorrected else self.bench

    def workbench(self, prepared: Prepared) -> Workbench:
        """What measuring a prepared network on the sensitivity set needs."""
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

    def loss(self, assignment: Assignment) -> Counts:
        """Sums of loss and Brier score of the deployed network over the sensitivity set, and its hits."""
        if assignment.corrected == "all" and not self.has_probe_model:
            return self.probe_loss(assignment)
        network, layers = self.preparation.deployed(assignment)
        folded, replaced = network.folded_with(layers)
        return self._summed(lambda block: deployed_scores(self.bench, folded, replaced, block))

    def probe_loss(self, assignment: Assignment) -> Counts:
        """The same as probes see it: without final corrections."""
        bench = self.plain_bench if assignment.corrected == "none" else self.bench
        return self._summed(lambda block: scores(bench, assignment, block))

    def _summed(self, scored: Callable[[int], Scores]) -> Counts:
        blocks = [scored(block) for block in range(len(self.inputs.sample_blocks))]
        loss, brier = (float(sum(getattr(block, name).sum() for block in blocks)) for name in ("losses", "briers"))
        hits = "".join("01"[int(hit)] for block in blocks for hit in block.hits)
        return Counts(len(hits), loss, brier=brier, hits=hits)

    @property
    def has_probe_model(self) -> bool:
        """Whether probes measure another network than the deployed one."""
        config = self.inputs.config
        return bool(at_stage(config.corrections, FinalCorrection)) or config.measure.batch_statistics

    def other_corrections(self, assignment: Assignment) -> list[Assignment]:
        """The same bits with fewer corrections: without the final ones, where there are some, and without any."""
        if not self.inputs.config.corrections:
            return []
        levels = ["static", "none"] if self.preparation.images_per_reestimation else ["none"]
        return [assignment.with_corrections(level) for level in ("all", *levels) if level != assignment.corrected]

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Evaluation batches of the validation set."""
        return evaluation_batches(len(self.inputs.slices.validation), EVALUATION_BATCH)

    @property
    def assignments_at_once(self) -> int:
        """How many assignments one task evaluates: several where images are decoded, else one, which spreads the work best."""
        return 1 if isinstance(self.inputs.slices.validation, MemorySlice) else ASSIGNMENTS_AT_ONCE

    def accuracies(self, assignments: Sequence[Assignment], start: int, stop: int) -> list[Counts]:
        """Counts on images start..stop−1 of the validation set, each decoded once, of every assignment as deployed."""
        variants = [self.preparation.deployed(assignment) for assignment in assignments]
        return count_each(variants, self.inputs.slices.validation, start, stop, reference=self.inputs.float_network)

    def count_batch(self, item: BatchItem) -> BatchCounts:
        """Counts of assignments on one evaluation batch, which is decoded once for all of them."""
        number, assignments = item
        counts = self.accuracies(assignments, *self.batches[number])
        return number, list(zip(assignments, counts, strict=True))

    def cache(self, which: str, variant: Variant = "deployed") -> EvaluationCache:
        """Evaluations on the `sensitivity` or the `validation` set: of deployed networks, or as probes see them."""
        identity = dict(self.identity.document)
        if variant == "probe_model":
            identity["variant"] = variant
        identity["slice"] = getattr(self.inputs.slices, which).sha256
        return EvaluationCache(self.inputs.folder / "evaluations" / which, fingerprint(identity))

    def validation_counts(
        self, assignments: Iterable[Assignment], count_batches: Callable[[list[BatchItem]], Iterable[BatchCounts]]
    ) -> dict[Assignment, Counts]:
        """Counts of each distinct assignment on the validation set: read where they are known, else counted and kept.

        Args:
            assignments: What to count.
            count_batches: Counts what is absent, in any order: `count_batch` of each item.
        """
        cache, batches = self.cache("validation"), self.batches

        def counted(absent: Sequence[Assignment]) -> Iterator[tuple[Assignment, Counts]]:
            parts: dict[Assignment, dict[int, Counts]] = {}
            for assignment in absent:
                kept = ((number, cache.get(assignment, batch)) for number, batch in enumerate(batches))
                parts[assignment] = {number: counts for number, counts in kept if counts is not None}
            # batch by batch: what is decoded for one assignment is decoded for its neighbours
            items = [
                (number, tuple(group[first : first + self.assignments_at_once]))
                for number in range(len(batches))
                for group in [[assignment for assignment, known in parts.items() if number not in known]]
                for first in range(0, len(group), self.assignments_at_once)
            ]
            for number, group_counts in count_batches(items):
                for assignment, counts in group_counts:
                    parts[assignment][number] = counts
                    if len(batches) > 1:
                        cache.put(assignment, counts, batches[number])
            for assignment, known in parts.items():
                # batches are added in order, so that the sum does not depend on which worker was first
                yield assignment, sum((known[number] for number in range(len(batches))), Counts())

        return cache.read_or_measure(assignments, counted)
