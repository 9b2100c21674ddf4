"""Cut: the rows of one table in two, to train on and to test on."""

from collections.abc import Sequence
from numbers import Integral
from string import ascii_uppercase

import numpy as np

from icrouting.tasks.splits import row_key
from icrouting.tasks.task import Example, TaskSpec

# The share of the rows that are tested on, and the seed of the draw, where none is named.
SHARE = 0.3
SEED = 0


def cut_rows(
    spec: TaskSpec, rows: Sequence[Example], split: float = SHARE, seed: int = SEED
) -> tuple[list[Example], list[Example]]:
    """Returns the rows to train on and those to test on, both in their order.

    The draw is seeded and made for each label by itself, so that a label of two rows or more is on
    both sides; a label's only row is trained on. Rows of a label that repeat one another stay
    together, since a training row that repeats one to test on would be lost.

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
    # For each label the places of its rows, by what rows that repeat one another have alike.
    groups_by_label: dict[int, dict[str, list[int]]] = {}
    for place, row in enumerate(rows):
        groups = groups_by_label.setdefault(row.label, {})
        groups.setdefault(row_key(row), []).append(place)
    rng = np.random.default_rng(seed)
    test_places: set[int] = set()
    for label in sorted(groups_by_label):
        groups = list(groups_by_label[label].values())
        # One group at least is tested on, and one trained on.
        n_test = max(1, round(split * len(groups)))
        n_test = min(n_test, len(groups) - 1)
        for index in rng.permutation(len(groups))[:n_test]:
            test_places.update(groups[index])
    train = [row for place, row in enumerate(rows) if place not in test_places]
    test = [row for place, row in enumerate(rows) if place in test_places]
    if not test:
        raise ValueError(
            f"task {spec.name!r}: each label has one row alone, repeats aside, so none is left to "
            "test on: add rows, or give rows to test on"
        )
    return train, test


def check_draw(split: object, seed: object) -> None:
    """Raises ValueError where `split` is no share of rows, or `seed` no seed."""
    if not isinstance(split, float) or not 0 < split < 1:
        raise ValueError(f"split must be a share between 0 and 1, such as 0.3, got {split!r}")
    # A seed may be numpy's integer; in Python true and false are integers too.
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
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
