"""What every criterion keeps. Subclass, set `name`, and the tests come with it."""

import pytest
import torch
from torch import Tensor

from clado import criteria
from clado.errors import DataError
from tests import tolerance

NUM_SAMPLES, NUM_CLASSES = 6, 5


def logits(*shape: int, seed: int = 0) -> Tensor:
    """Logits (..., N, C)."""
    return 2 * torch.randn(*shape, NUM_SAMPLES, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NUM_SAMPLES) % NUM_CLASSES


class CriterionContract:
    """Laws of every criterion."""

    name: str

    def test_it_is_a_loss_of_each_sample_in_float64(self):
        z = logits(3, seed=1)
        loss = criteria.bind(self.name, logits(), LABELS)
        assert loss(z).dtype == torch.float64
        assert loss(z).shape == (3, NUM_SAMPLES)
        alone = torch.stack([loss(row) for row in z])
        torch.testing.assert_close(loss(z), alone, rtol=0, atol=8 * tolerance.eps() * float(z.abs().max()))

    def test_its_residual_is_its_gradient_at_the_float_logits(self):
        z = logits().double().requires_grad_()
        (gradient,) = torch.autograd.grad(criteria.bind(self.name, logits(), LABELS)(z).sum(), z)
        residual = criteria.residual(self.name, logits(), LABELS)
        expected = torch.zeros_like(gradient) if residual is None else residual
        torch.testing.assert_close(gradient, expected, rtol=0, atol=4 * tolerance.eps())

    def test_its_target_is_a_distribution_whose_top_class_hits(self):
        target = criteria.criterion_of(self.name).target(logits(), LABELS)
        assert target.dtype == torch.float64
        torch.testing.assert_close(target.sum(-1), torch.ones(NUM_SAMPLES, dtype=torch.float64))
        assert bool(criteria.hits(self.name, target, logits(), LABELS).all())

    def test_labels_are_asked_for_where_they_are_read(self):
        if criteria.criterion_of(self.name).needs_labels:
            with pytest.raises(DataError, match=f"{self.name} needs labels and the images have none"):
                criteria.bind(self.name, logits(), None)
        else:
            z = logits(seed=1)
            without, with_labels = (criteria.bind(self.name, logits(), labels)(z) for labels in (None, LABELS))
            assert torch.equal(without, with_labels)
