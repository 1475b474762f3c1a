"""The comparison of `make golden`: it finds what differs, and only that."""

import pytest

from tests import golden

THEN = {
    "demo/store/pairs/sums": "float64(2, 2) abc",
    "demo/record/results/0/loss": 0.5,
    "demo/record/results/0/gap": float("nan"),
}


def test_equal_figures_have_no_differences():
    assert golden.differences(THEN, dict(THEN)) == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({**THEN, "demo/store/pairs/sums": "float64(2, 2) abd"}, "abc then, float64(2, 2) abd now"),
        ({**THEN, "demo/record/results/0/loss": 0.5000000000000001}, "0.5 then, 0.5000000000000001 now"),
        ({key: THEN[key] for key in list(THEN)[1:]}, "only then"),
        ({**THEN, "demo/record/results/0/loss_2": 0.5}, "only now"),
    ],
    ids=["an array", "the last bit", "absent", "new"],
)
def test_a_difference_is_found(now, said):
    (line,) = golden.differences(THEN, now)
    assert said in line


def test_renamed_and_deleted_keys_are_no_differences(monkeypatch):
    monkeypatch.setattr(golden, "RENAMED", {r"results/(\d+)/loss$": r"results/\1/loss_deployed"})
    monkeypatch.setattr(golden, "DELETED", ("gap$",))
    now = {"demo/store/pairs/sums": "float64(2, 2) abc", "demo/record/results/0/loss_deployed": 0.5}
    assert golden.differences(THEN, now) == []


def test_settings_are_written_under_their_former_keys():
    now = golden.settings_of("vit", {})
    then = golden.settings_of("vit", {"gradients.vectors": "gradients.former"})
    assert now["gradients"] == {"vectors": 2}
    assert then["gradients"] == {"former": 2}
