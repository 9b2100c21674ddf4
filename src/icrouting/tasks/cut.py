"""Cut: the rows of one table in two, to train on and to test on."""

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from icrouting.tasks.task import Example, TaskSpec

# The share of the rows that are tested on, and the seed of the draw, where none is named.
SHARE = 0.3
SEED = 0


def cut_rows(
    spec: TaskSpec, rows: Sequence[Example], split: float = SHARE, seed: int = SEED
) -> tuple[list[Example], list[Example]]:
    """Returns the rows to train on and those to test on, both in their order.

    The draw is seeded and made for each label by itself, so that a label of two rows or more is on
    both sides; a label's only row is trained on.

    Args:
        spec: how the task reads.
        rows: all rows.
        split: the share of the rows to test on, between 0 and 1.
        seed: of the draw.

    Raises:
        ValueError: `split` or `seed` does not fit, or the rows are too few or of one label.
    """
    check_draw(split, seed)
    check_labels(spec, rows)
    places_by_label: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places_by_label.setdefault(row.label, []).append(place)
    rng = np.random.default_rng(seed)
    test_places: set[int] = set()
    for label in sorted(places_by_label):
        places = places_by_label[label]
        # One row at least is tested on, and one trained on.
        n_test = max(1, round(split * len(places)))
        n_test = min(n_test, len(places) - 1)
        test_places.update(rng.permutation(places)[:n_test].tolist())
    train = [row for place, row in enumerate(rows) if place not in test_places]
    test = [row for place, row in enumerate(rows) if place in test_places]
    if not test:
        raise ValueError(
            f"task {spec.name!r}: each label has one row alone, so none is left to test on: "
            "add rows, or give rows to test on"
        )
    return train, test


def check_draw(split: object, seed: object) -> None:
    """Raises ValueError where `split` is no share of rows, or `seed` no seed."""
    if not isinstance(split, float) or not 0 < split < 1:
        raise ValueError(f"split must be a share between 0 and 1, such as 0.3, got {split!r}")
    # In Python true and false are integers too.
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer of 0 or more, got {seed!r}")


def check_labels(spec: TaskSpec, rows: Sequence[Example]) -> None:
    """Raises ValueError where rows to learn from are fewer than the options, or of one label."""
    if len(rows) < len(spec.options):
        raise ValueError(
            f"task {spec.name!r}: expected a row or more for each of the {len(spec.options)} "
            f"options, got {len(rows)} rows in all: add rows"
        )
    labels = {row.label for row in rows}
    if len(labels) == 1:
        label = rows[0].label
        answer = spec.options[label] if spec.options else ascii_uppercase[label]
        raise ValueError(
            f"task {spec.name!r}: expected rows of two labels or more, but all {len(rows)} rows "
            f"have the label {answer!r}: add rows of another label"
        )
