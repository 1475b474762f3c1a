"""Laws of blocks: what a network repeats, read off the names of its weights; or as given."""

import pytest

from clado.blocks import module_blocks
from clado.errors import ConfigurationError
from clado.space import Layer, SearchSpace

TREES = {
    "flat": (["stem.weight", "mid.weight", "head.weight"], [[0], [1], [2]]),
    "a ResNet": (
        ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer2.0.conv1.weight",
         "layer2.0.downsample.0.weight", "layer2.1.conv1.weight", "fc.weight"],
        [[0], [1, 2], [3, 4], [5], [6]],
    ),
    "inverted bottlenecks with squeeze and excitation": (
        ["features.0.0.weight", "features.1.block.0.0.weight", "features.1.block.1.fc1.weight", "features.1.block.1.fc2.weight",
         "features.1.block.2.0.weight", "features.2.0.weight"],
        [[0], [1, 2, 3, 4], [5]],
    ),
    "an encoder": (
        ["conv_proj.weight", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
         "encoder.layers.encoder_layer_0.self_attention.out_proj.weight", "encoder.layers.encoder_layer_0.mlp.0.weight",
         "encoder.layers.encoder_layer_0.mlp.3.weight", "encoder.layers.encoder_layer_1.mlp.0.weight",
         "encoder.layers.encoder_layer_1.mlp.3.weight", "heads.head.weight"],
        [[0], [1, 2, 3, 4], [5, 6], [7]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), TREES.values(), ids=list(TREES))
def test_blocks_are_what_repeats_and_each_layer_is_in_one(names, expected):
    blocks = module_blocks(names)
    assert [list(block) for block in blocks] == expected
    assert sorted(i for block in blocks for i in block) == list(range(len(names)))


def space_of(*names: str) -> SearchSpace:
    return SearchSpace.uniform([Layer(name, (2,), "linear") for name in names], (2, 4))


def test_given_blocks_replace_the_module_trees_and_other_layers_are_alone():
    space = space_of("a.0.x.weight", "a.0.y.weight", "b.weight", "c.weight")
    assert space.blocks == ((0, 1), (2,), (3,))
    assert space.blocked([["a.0.x*", "c*"]]).blocks == ((0, 3), (1,), (2,))


@pytest.mark.parametrize(
    ("groups", "message"), [([["d*"]], r"\['d\*'\] matches no layer"), ([["a*"], ["b*", "a*"]], "a.weight is in two blocks")]
)
def test_blocks_that_match_nothing_or_overlap_are_refused(groups, message):
    with pytest.raises(ConfigurationError, match=message):
        space_of("a.weight", "b.weight").blocked(groups)
