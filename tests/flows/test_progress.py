"""Progress where there is no terminal: lines that anyone may keep."""

import threading

import pytest

from flows import progress as progress_module
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


def test_lines_come_while_nothing_ends_and_the_last_one_says_that_all_is_done(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.001)
    with progress("measuring", 4.0) as advance:
        advance(1.0)
        lines = ""
        while lines.count("\n") < 3:  # of the thread that watches
            lines += capsys.readouterr().err
    later = [line for line in lines.splitlines() if not line.startswith("measuring:   0.0 %")]  # not from before the first end
    assert all(line.startswith("measuring:  25.0 %") for line in later)
    assert "ETA unknown" in lines
    advanced = capsys.readouterr().err.splitlines()
    assert all("100.0 %" not in line for line in advanced)  # three quarters are left


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_goes_through_and_ends_the_watch(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(ZeroDivisionError), progress("measuring", 4.0):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "clado-progress"]


def test_a_bar_is_full_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True)
    with progress("measuring", 2.0) as advance:
        advance(2.0)
    text = capsys.readouterr().err
    assert "100%" in text
    assert "ETA 0 s" in text
