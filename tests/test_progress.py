"""Bars: shown where a person watches, and from the beginning."""

import io
import time

from icrouting.runtime import progress
from icrouting.runtime.progress import track


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self):
        return True


def watched(monkeypatch):
    """A terminal in standard error's place; not as a fixture, behind which pytest puts its own."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    return terminal


def test_a_bar_shows_before_its_first_item_is_done(monkeypatch):
    terminal = watched(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.01)
    items = track([1, 2], "extraction", [32, 32], "prompts")
    next(items)
    deadline = time.monotonic() + 5
    while not terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "extraction:   0%" in terminal.getvalue()
    assert "0/64" in terminal.getvalue()
    items.close()


def test_short_work_shows_no_bar(monkeypatch):
    terminal = watched(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.2)
    assert list(track([1, 2], "extraction", [32, 32], "prompts")) == [1, 2]
    time.sleep(0.3)
    assert terminal.getvalue() == ""
