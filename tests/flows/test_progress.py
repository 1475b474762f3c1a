"""Progress where there is no terminal: lines that anyone may keep."""

import pytest

from flows.progress import progress


@pytest.mark.parametrize(
    ("total", "amounts", "last"),
    [(4, (1, 3), "100.0 %"), (0, (0, 0), "100.0 %"), (0.0, (0.0,), "100.0 %"), (3, (0, 3), "100.0 %")],
)
def test_the_last_line_says_that_all_is_done_also_where_it_costs_nothing(total, amounts, last, capsys):
    with progress("measuring", total) as advance:
        for amount in amounts:
            advance(amount)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("measuring:")
    assert last in line
