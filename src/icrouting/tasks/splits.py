"""Splits: a validation slice of train, and no training row that a held-back row repeats."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from icrouting.tasks.task import Example, Task, TaskSpec

N_VALIDATION = 100
_SEED = 0
# Of fewer rows than this, the draw for validation may leave a class none to train on.
_FEW = 50
# A phrase shorter than this, in words, is common property ("a good film"): it says nothing of its
# source.
_MIN_WORDS = 5
# A word holds a letter or digit: "," and "--" are none.
_WORD = re.compile(r"\S*[^\W_]\S*")
_NOT_KEY = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789"))


def make_task(
    spec: TaskSpec,
    train: Sequence[Example],
    test: Sequence[Example],
    others: Sequence[Example] = (),
) -> Task:
    """Returns a task whose splits know nothing of one another.

    A fifth of the training rows, at most 100, become the validation slice, by a seeded draw. Rows
    that repeat one another or a held-back row (case, spacing and punctuation ignored), or that hold
    or lie inside one of five words or more, are left out and counted in `n_dropped`.

    Args:
        spec: how the task reads.
        train: rows to train and to validate on.
        test: rows to test on, all of which stay.
        others: rows of other tasks that training and validation must not know either.

    Raises:
        ValueError: training rows of one class alone are left.
    """
    unique = _without_repeats(train)
    free = apart(unique, [*test, *others])
    validation = _validation_slice(unique, free)
    drawn = {id(row) for row in validation}
    undrawn = [row for row in free if id(row) not in drawn]
    # A training row may still hold a row that the validation slice took, or lie inside one.
    kept_rows = apart(undrawn, validation)
    labels = {row.label for row in kept_rows}
    if len(labels) < 2:
        raise ValueError(
            f"task {spec.name!r}: expected training rows of two classes or more, "
            f"got {len(kept_rows)} of label {sorted(labels)}: add rows of another class"
        )
    n_dropped = len(train) - len(kept_rows) - len(validation)
    return Task(spec, tuple(kept_rows), tuple(test), tuple(validation), n_dropped)


def _without_repeats(rows: Sequence[Example]) -> list[Example]:
    """Returns the first row of each key, ordered by where each key comes last."""
    row_by_key: dict[str, Example] = {}
    # Backwards, the first row of a key is what overwrites the others, at the place of the last.
    # Every split drawn so far rests on this order.
    for row in reversed(rows):
        row_by_key[_row_key(row)] = row
    backwards = list(row_by_key.values())
    return backwards[::-1]


def _validation_slice(unique: Sequence[Example], free: Sequence[Example]) -> list[Example]:
    """Returns a seeded draw from the free ones of unique rows, in the order of these."""
    # By identity: a row holds a dictionary, and cannot be hashed.
    free_ids = {id(row) for row in free}
    order = np.random.default_rng(_SEED).permutation(len(unique)).tolist()
    candidates = [place for place in order if id(unique[place]) in free_ids]
    if len(unique) < _FEW:
        # None of a class's few rows may be its last, so each class keeps its first.
        first_places: dict[int, int] = {}
        for place in sorted(candidates):
            first_places.setdefault(unique[place].label, place)
        kept_back = set(first_places.values())
        candidates = [place for place in candidates if place not in kept_back]
    n_drawn = min(N_VALIDATION, len(free) // 5)
    return [unique[place] for place in sorted(candidates[:n_drawn])]


def apart(rows: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """Returns the rows that repeat no held-back row, hold no long one, and lie in none if long."""
    held_keys = {_row_key(row) for row in held}
    long_held_keys = [_row_key(row) for row in held if is_long(_row_text(row))]
    keys = [_row_key(row) for row in rows]
    held_inside = inside(long_held_keys, keys)
    lying_inside = _long_rows_inside(rows, keys, long_held_keys)

    kept_rows = []
    for place, row in enumerate(rows):
        repeats = keys[place] in held_keys
        holds_a_long_one = bool(held_inside[place])
        if not (repeats or holds_a_long_one or place in lying_inside):
            kept_rows.append(row)
    return kept_rows


def _long_rows_inside(
    rows: Sequence[Example], keys: Sequence[str], held_keys: Sequence[str]
) -> set[int]:
    """Returns the places of long rows that lie inside a held-back one."""
    long_places = [place for place, row in enumerate(rows) if is_long(_row_text(row))]
    long_keys = [keys[place] for place in long_places]
    places = set()
    for indices in inside(long_keys, held_keys):
        places |= {long_places[index] for index in indices}
    return places


def _row_texts(row: Example) -> list[str]:
    return [*row.fields.values(), *row.choices]


def _row_text(row: Example) -> str:
    return " ".join(_row_texts(row))


def _row_key(row: Example) -> str:
    # The newlines keep texts that were cut elsewhere into fields apart.
    return "\n".join(_field_key(text) for text in _row_texts(row))


def _field_key(text: str) -> str:
    """Returns the key of a text, which keeps its letters where many are not Latin."""
    letters = "".join(filter(str.isalnum, text.lower()))
    n_foreign = sum(not letter.isascii() for letter in letters)
    is_latin = 10 * n_foreign <= len(letters)
    key = text_key(text) if is_latin else letters
    # A text of punctuation alone has no letters, and is told apart by itself.
    return key or text


def text_key(text: str) -> str:
    """Returns the letters and digits of a text in lower case, without the treebank's brackets.

    Letters with accents are dropped, since data sets spell them in different encodings.
    """
    without_brackets = text.lower().replace("-lrb-", "").replace("-rrb-", "")
    plain = without_brackets.encode("ascii", "ignore")
    return plain.translate(None, _NOT_KEY).decode("ascii")


def is_long(text: str) -> bool:
    """Returns whether a text has five words or more."""
    return len(_WORD.findall(text)) >= _MIN_WORDS


def inside(inner: Sequence[str], outer: Sequence[str]) -> list[set[int]]:
    """Returns for each key of `outer` the indices of the keys of `inner` that it contains."""
    # Comparing all pairs would take minutes. So the first characters of the inner keys, as many as
    # the shortest has, are looked up at every position of an outer key, and only what starts alike
    # is compared.
    width = min(map(len, inner), default=1)
    indices_by_start: defaultdict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(inner):
        indices_by_start[key[:width]].append(index)

    contained = []
    for text in outer:
        indices: set[int] = set()
        for start in range(len(text) - width + 1):
            # `get`, since a look-up in brackets would add an entry for every position.
            for index in indices_by_start.get(text[start : start + width], ()):
                if text.startswith(inner[index], start):
                    indices.add(index)
        contained.append(indices)
    return contained
