"""Laws of noise: standard errors cover, shrinking improves, and layers that the images do not decide are counted."""

import numpy as np
import pytest

from clado.choosing.constraints import constraint
from clado.choosing.local_search import settle
from clado.choosing.proposals import program_of
from clado.choosing.stability import RESAMPLES, resampled, stability
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.plugins import available
from clado.records.results import Stability
from clado.reporting.tables import stability_text
from clado.space import Layer, SearchSpace
from tests.synthetic import make_record

SPACE = SearchSpace.uniform([Layer(f"layer{i}.weight", (4, 4 + 3 * i), "linear") for i in range(8)], (2, 4, 8))
K = SPACE.num_options
OWNER = np.array([option.layer for option in SPACE.options])
CROSS = OWNER[:, None] < OWNER[None, :]
SCALE = np.array([4.0 ** (2 - option.bits) for option in SPACE.options])


def truth(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each option alone (K,), interactions (K, K)): small at wide bits, interactions of either sign."""
    rng = np.random.default_rng(seed)
    alone = SCALE * rng.gamma(4.0, 0.25, size=K)
    return alone, np.triu(0.1 * rng.normal(size=(K, K)) * SCALE[:, None] * SCALE[None, :], 1) * CROSS


def measured(noise: float, seed: int = 0, blocks: int = 16, images: int = 16, of: int = 0) -> Measured:
    """Sums of sample blocks whose means scatter about the truth by `noise` times each loss; a shared shift cancels."""
    alone, cross = truth(of)
    rng = np.random.default_rng([seed, 7])
    single = alone * (1 + noise * rng.normal(size=(blocks, K)) / images**0.5)
    scatter = noise * 0.3 * SCALE[:, None] * SCALE[None, :] * rng.normal(size=(blocks, K, K)) / images**0.5
    base = 5 + rng.normal(size=(blocks, 1))
    pairs = base[:, :, None] + single[:, :, None] + single[:, None, :] + cross + scatter
    gram = np.zeros((blocks, 2 + K, 1 + K))
    gram[:, 2:, 1:] = (cross + cross.T + np.diag(2 * alone)) + (scatter + scatter.transpose(0, 2, 1)) / 2
    sums = {"singles": np.concatenate([base, base + single], 1), "pairs": np.where(CROSS, pairs, np.nan), "gram": gram}
    return Measured(SPACE, "kl_to_float", np.full(blocks, images), {kind: images * values for kind, values in sums.items()})


@pytest.mark.parametrize("name", ["layerwise", "pairwise", "gauss_newton"])
def test_standard_errors_are_the_scatter_of_repeated_measurements(name):
    assert name in available("estimators")
    matrices = [estimators.estimate(name, measured(1.0, seed)) for seed in range(60)]
    observed = np.std([matrix.values for matrix in matrices], axis=0, ddof=1)
    claimed = np.sqrt(np.mean([matrix.standard_error**2 for matrix in matrices], axis=0))
    assert np.array_equal(observed > 1e-12, claimed > 1e-12)
    ratio = observed[observed > 1e-12] / claimed[observed > 1e-12]
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert 0.6 < ratio.min() < ratio.max() < 1.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_shrinking_brings_noisy_cross_terms_nearer_to_the_truth_and_to_held_out_blocks(seed, noise):
    matrix = estimators.estimate("pairwise", measured(noise, seed))
    held_out = estimators.estimate("pairwise", measured(noise, seed + 1000)).values
    shrunk, true = matrix.shrink().values, truth()[1]
    for reference in (true, held_out):
        before, after = (((values - reference)[CROSS] / np.outer(SCALE, SCALE)[CROSS]) ** 2 for values in (matrix.values, shrunk))
        assert after.mean() < before.mean()


def test_shrinking_leaves_what_is_not_noise_and_what_is_within_a_layer():
    matrix = estimators.estimate("pairwise", measured(0.0))
    assert matrix.shrink().values == pytest.approx(matrix.values, rel=1e-9)
    noisy = estimators.estimate("pairwise", measured(5.0))
    inside = noisy.in_layer_mask()
    assert np.array_equal(noisy.shrink().values[inside], noisy.values[inside])
    assert np.array_equal(noisy.shrink().values, noisy.shrink().values.T)
    assert (np.abs(noisy.shrink().values) <= np.abs(noisy.values)).all()
    alone = estimators.estimate("pairwise", measured(5.0, blocks=1))
    assert alone.shrink() is alone  # one block has no standard error


def posed(matrix, budget):
    return program_of(matrix, [constraint("average_bits", SPACE, float(budget.split()[0]))])


def stable(data: Measured, *budgets: str) -> tuple[Stability, ...]:
    matrix = estimators.estimate("pairwise", data)
    answers = {}
    for budget in budgets:
        program = posed(matrix, budget)
        answers[budget] = program.assignment(settle(program, program.narrowest))
    return stability(data, lambda m: estimators.estimate("pairwise", m), posed, answers)


def test_without_noise_every_layer_is_decided():
    for row in stable(measured(0.0), "3 bits", "5 bits"):
        assert row.shares == (1.0,) * 8
        assert (row.multiples, row.undecided, row.settled_by) == ((1,), (0,), 256)


def test_more_noise_decides_fewer_layers_and_asks_for_more_images():
    quiet, loud = (stable(measured(noise), "3 bits")[0] for noise in (0.05, 8.0))
    assert quiet.undecided[0] < loud.undecided[0]
    assert (quiet.settled_by or 10**9) <= (loud.settled_by or 10**9)
    assert all(0 <= share <= 1 for share in loud.shares)
    assert loud.undecided[0] == sum(share < 0.9 for share in loud.shares)
    assert loud.num_resamples == RESAMPLES


def test_the_same_seed_gives_the_same_shares_and_one_block_none():
    assert stable(measured(3.0), "3 bits") == stable(measured(3.0), "3 bits")
    assert stable(measured(3.0, blocks=1), "3 bits") == ()


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_resample_of_more_blocks_scatters_as_more_images_would(multiple):
    data, rng = measured(2.0), np.random.default_rng(0)
    draws = [resampled(data, multiple, rng) for _ in range(200)]
    assert {draw.num_images for draw in draws} == {256 * multiple}
    means = np.array([draw.mean(draw.increases()) for draw in draws])
    expected = data.standard_error(data.increases()) * (15 / 16 / multiple) ** 0.5
    assert (means.std(axis=0) / expected).mean() == pytest.approx(1, abs=0.05)
    assert means.mean(axis=0) == pytest.approx(data.mean(data.increases()), abs=5 * expected.max())


def test_the_sentence_counts_layers_and_images():
    from dataclasses import replace

    row = Stability("3 bits", "pairwise", 256, 24, (0.5, *[1.0] * 21), (1, 4), (1, 0))
    stuck = replace(row, budget="2.5 bits", multiples=(1, 4, 16), undecided=(3, 2, 1))
    clear = replace(row, budget="4 bits", multiples=(1,), undecided=(0,))
    record = make_record()
    assert stability_text(record) == ""
    text = stability_text(replace(record, stability=(row, stuck, clear)))
    assert text == (
        "With 256 images, pairwise's answers, chosen or not, have undecided layers: 1 of 22 at 3 bits (about 1,024 would "
        "settle them); 3 of 22 at 2.5 bits (even 4,096 would leave 1) (bootstrap over sample blocks, 24 resamples)."
    )
    assert "decided at every budget" in stability_text(replace(record, stability=(clear,)))
