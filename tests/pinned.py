"""Pinned wheels, and their labelled texts read once for all tests of a session."""

import pickle
from pathlib import Path

import pytest

from icrouting.runtime import wheels
from icrouting.tasks import catalogue, staicc

ROWS = "rows.pkl"
TASKS = "tasks.pkl"


def fetch_or_skip(*names: str) -> list[Path]:
    """The folders of pinned wheels; the test is skipped where these cannot be had."""
    try:
        return [wheels.fetch(name) for name in names]
    except ConnectionError as error:
        pytest.skip(f"the pinned wheels cannot be had here: {error}")


def read_all(folder: Path) -> None:
    """Writes the rows of all pinned sets, and the tasks that are made of them, to a folder.

    Two sets leave out what a third one has: that one is read and dealt out here once, not thrice.
    """
    (wheel,) = fetch_or_skip("staicc")
    rows = {name: staicc._read_rows(wheel, catalogue.SPECS[name]) for name in catalogue.STAICC}
    deal_reviews = staicc._deal_reviews

    deals = {}

    def dealt(reviews, rng):
        """The deal of these very rows by this very generator, made once."""
        key = (id(reviews), repr(rng.bit_generator.state))
        if key not in deals:
            deals[key] = deal_reviews(reviews, rng)
        return deals[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staicc, "_read_rows", lambda folder, spec: rows[spec.name])
        patch.setattr(staicc, "_deal_reviews", dealt)
        tasks = {name: staicc.read_task(catalogue.SPECS[name]) for name in catalogue.STAICC}
    (folder / ROWS).write_bytes(pickle.dumps(rows))
    (folder / TASKS).write_bytes(pickle.dumps(tasks))
