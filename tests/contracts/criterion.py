"""What every criterion keeps. Subclass, set `name`, and the tests come with it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from clado import criteria
from clado.criteria import PackedCriterion
from clado.errors import DataError
from clado.network.outputs import LOGITS, Outputs
from tests import tolerance

NUM_SAMPLES, NUM_CLASSES = 6, 5


def logits(*shape: int, seed: int = 0) -> Tensor:
    """Logits (..., N, C)."""
    return 2 * torch.randn(*shape, NUM_SAMPLES, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NUM_SAMPLES) % NUM_CLASSES


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers (N, ...)."""
    return torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))


def dense(seed: int = 0) -> Tensor:
    """Logits (N, C, H, W)."""
    return 2 * random(NUM_CLASSES, 2, 3, seed=seed)


def nested(seed: int = 0) -> dict[str, object]:
    """Outputs of several tensors."""
    return {"maps": random(2, 3, seed=seed), "rest": [random(4, seed=seed + 1), random(seed=seed + 2)]}


MASKS = torch.arange(NUM_SAMPLES * 6).reshape(NUM_SAMPLES, 2, 3) % NUM_CLASSES
MASKS[0] = MASKS[1, 0, 0] = -100  # all positions of a sample are ignored, and one of another


class CriterionContract:
    """Laws of every criterion."""

    name: str
    forms = ("logits", "dense", "nested")
    """Forms of outputs that it takes."""

    def cases(self) -> Iterator[tuple[PackedCriterion, Tensor, Tensor, Tensor]]:
        """(criterion, packed outputs, packed float outputs, targets) of each form."""
        for form in self.forms:
            if form == "logits":
                yield criteria.packed(self.name), logits(seed=1), logits(), LABELS
                continue
            make = dense if form == "dense" else nested
            outputs = Outputs.of(make(), NUM_SAMPLES)
            yield criteria.packed(self.name, outputs), outputs.packed(make(seed=1)), outputs.packed(make()), MASKS

    def test_it_is_a_loss_of_each_sample_in_float64(self):
        for criterion, z, floats, targets in self.cases():
            rows = torch.stack([z, floats, 2 * z])
            loss = criterion.of(floats, targets)
            assert loss(rows).dtype == torch.float64
            assert loss(rows).shape == (3, NUM_SAMPLES)
            alone = torch.stack([loss(row) for row in rows])
            torch.testing.assert_close(loss(rows), alone, rtol=0, atol=8 * tolerance.eps() * float(rows.abs().max()))

    def test_its_residual_is_its_gradient_at_the_float_outputs(self):
        for criterion, _, floats, targets in self.cases():
            z = floats.double().requires_grad_()
            (gradient,) = torch.autograd.grad(criterion.of(floats, targets)(z).sum(), z)
            residual = criterion.slope(floats, targets)
            expected = torch.zeros_like(gradient) if residual is None else residual
            torch.testing.assert_close(gradient, expected, rtol=0, atol=4 * tolerance.eps())

    def test_its_curvature_is_the_hessian_at_the_float_outputs(self):
        """Against autograd, sample by sample. That of a softmax of logits is tested where it is measured."""
        for criterion, z, floats, targets in self.cases():
            assert "curvature" in criterion.offers
            if criterion.root is None:
                assert "classes" in criterion.offers
                continue
            changes, loss = torch.stack([z - floats, z.roll(1, 1)]).double(), criterion.of(floats.double(), targets)
            roots = criterion.root(floats.double(), targets)(changes)
            for n, u in enumerate(changes.transpose(0, 1)):

                def of_sample(x: Tensor, n: int = n, loss: criteria.Loss = loss, floats: Tensor = floats) -> Tensor:
                    return loss(torch.cat([floats[:n].double(), x[None], floats[n + 1 :].double()]))[n]

                expected = u @ torch.autograd.functional.hessian(of_sample, floats[n].double()) @ u.T
                # Hessians of this size are sums of at most 30 terms, each of some operations
                bound = 100 * tolerance.of_sum(30, torch.float64) * float(u.square().sum())
                torch.testing.assert_close(roots[:, n] @ roots[:, n].T, expected, rtol=0, atol=bound)

    def test_its_target_is_a_distribution_whose_top_class_hits(self):
        criterion = criteria.packed(self.name)
        if criterion.target is None:
            assert "classes" not in criterion.offers
            return
        target = criterion.target(logits(), LABELS)
        assert target.dtype == torch.float64
        torch.testing.assert_close(target.sum(-1), torch.ones(NUM_SAMPLES, dtype=torch.float64))
        assert bool(criteria.hits(self.name, target, logits(), LABELS).all())

    def test_labels_are_asked_for_where_they_are_read(self):
        if criteria.packed(self.name, LOGITS).needs_targets:
            with pytest.raises(DataError, match=f"{self.name} needs labels and the images have none"):
                criteria.bind(self.name, logits(), None)
        else:
            z = logits(seed=1)
            without, with_labels = (criteria.bind(self.name, logits(), labels)(z) for labels in (None, LABELS))
            assert torch.equal(without, with_labels)
