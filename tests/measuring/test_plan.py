"""Laws of plans: every probe is planned once, counts are those of the method, and everything is an integer."""

import pytest

from clado.errors import ConfigurationError
from clado.measuring.batching import batching, rows_within_memory
from clado.measuring.plan import Plan, Workload, sample_blocks
from clado.network.batch_size import Processor
from clado.space import Layer, SearchSpace


def space(num_layers, bits=(2, 4, 8)):
    return SearchSpace.uniform([Layer(f"l{i}", (4, 4), "linear", macs=16) for i in range(num_layers)], bits)


@pytest.mark.parametrize(
    ("layers", "evaluations"),
    [(19, 1597), (35, 5461), (52, 12091), (51, 11629), (62, 17206), (79, 27967), (109, 53302), (72, 23221)],
)
def test_evaluations_are_those_of_the_methods_table(layers, evaluations):
    plan = Plan(space(layers), ((0, 10),), ("singles", "pairs"), 50)
    assert sum(plan.evaluations(tile) for tile in plan.tiles) == evaluations
    assert plan.forward_images(plan.tiles) == 10 * evaluations


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_row_tiles_cover_every_row_of_every_block_once(rows):
    plan = Plan(space(3), sample_blocks(10, 4), ("pairs",), rows)
    covered = [(tile.sample_block, row) for tile in plan.tiles for row in range(tile.first, tile.stop)]
    assert sorted(covered) == [(block, row) for block in range(4) for row in range(9)]


@pytest.mark.parametrize(("images", "blocks"), [(10, 3), (16, 16), (7, 1)])
def test_blocks_cover_the_images_evenly(images, blocks):
    ranges = sample_blocks(images, blocks)
    assert [k for start, stop in ranges for k in range(start, stop)] == list(range(images))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_more_blocks_than_images_are_refused():
    with pytest.raises(ConfigurationError, match="3 images cannot be cut into 4"):
        sample_blocks(3, 4)


def test_macs_of_pairs_are_suffixes_plus_prefixes():
    plan = Plan(space(3, (2, 4)), ((0, 1),), ("pairs",), 6)
    work = Workload(48, (48, 32, 16))
    pairs = 2 * 2 * 32 + 2 * 2 * 16 + 2 * 2 * 16  # (0, 1), (0, 2), (1, 2): suffix of the later layer
    prefixes = 48 + 2 * (48 - 16) + 2 * (32 - 16) + 2 * 0  # the float run, then each row to the last cut
    assert plan.macs(plan.tiles[0], work) == pairs + prefixes


def test_finer_row_tiles_cost_only_prefixes():
    work = Workload(160, tuple(16 * (10 - i) for i in range(10)))
    whole, fine = (Plan(space(10), ((0, 1),), ("pairs",), rows) for rows in (30, 5))
    costs = [sum(plan.macs(tile, work) for tile in plan.tiles) for plan in (whole, fine)]
    assert costs[0] < costs[1] <= costs[0] + 160 * fine.num_row_tiles


def test_rows_shrink_to_the_memory_limit_and_too_little_is_refused_with_numbers():
    alive = [100, 200, 50, 10]
    assert rows_within_memory(space(4), 10, alive, 10**6) == 12
    assert rows_within_memory(space(4), 10, alive, 10_000) == 12  # before layer 1: 3 rows, the float run, and a new one
    assert rows_within_memory(space(4), 10, alive, 9_999) == 2
    assert rows_within_memory(space(4), 10, alive, 10_999, working_bytes=1_000) == 2
    with pytest.raises(ConfigurationError, match=r"three stored prefixes of 10 images, 2\.0 MB each before l1"):
        rows_within_memory(space(4), 10, [1, 2 * 10**5, 1, 1], 3 * 10**6)


@pytest.mark.parametrize("limit", [10_000, 40_000, 10**6])
def test_a_batch_and_its_buffers_stay_within_the_limit_and_the_cache(limit):
    chosen = batching([100, 50, 20], [400, 200, 50], 64, limit_bytes=limit, processor=Processor(10_000, 512))
    assert chosen.working_bytes <= limit // 2
    assert list(chosen.batch_images) == sorted(chosen.batch_images)
    assert 1 <= chosen.images_per_pass <= chosen.batch_images[0]
    batches = zip(chosen.batch_images, [400, 200, 50], strict=True)
    assert all(batch * peak <= 10_000 or batch == chosen.images_per_pass for batch, peak in batches)


@pytest.mark.parametrize(("images", "passes"), [(8, 1), (25, 1), (40, 1), (49, 1), (50, 2), (64, 2), (120, 4)])
def test_a_pass_is_what_the_cache_holds_and_less_than_twice_that_rather_than_two_halves(images, passes):
    chosen = batching([100, 50, 20], [400, 200, 50], images, processor=Processor(10_000, 512))
    assert chosen.images_per_pass == -(-images // passes)
    assert chosen.batch_images == tuple(max(batch, chosen.images_per_pass) for batch in (25, 50, 200))


def test_a_batch_is_as_asked_for_where_it_fits():
    assert batching([4, 4], [8, 8], 64, 100).batch_images == (100, 100)
    assert batching([4, 4], [8, 8], 64, 100).images_per_pass == 64
    assert batching([4, 4], [8, 8], 64, 100, limit_bytes=4 * 12 * 30).batch_images == (30, 30)


def test_one_image_that_does_not_fit_is_refused_with_needed_and_available():
    with pytest.raises(ConfigurationError, match=r"needed 48\.0 MB, available 16\.0 MB"):
        batching([4 * 10**6], [8 * 10**6], 64, limit_bytes=16 * 10**6)
