"""Splits: a validation slice of train, and no training row that a held-back row repeats."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from icrouting.tasks.task import Example, Task, TaskSpec

# A training row that is left out, and the row that it repeats.
Clash = tuple[Example, Example]
N_VALIDATION = 100
_SEED = 0
# Of fewer rows than this, the draw for validation may leave a class none to train on.
_FEW = 50
# A phrase shorter than this, in words, is common property ("a good film"): it says nothing of its
# source.
_MIN_WORDS = 5
# A word holds a letter or digit: "," and "--" are none.
_WORD = re.compile(r"\S*[^\W_]\S*")
_UNSPACED = re.compile(r"\S+")
_BARE_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+")
_NOT_KEY = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789"))


def make_task(
    spec: TaskSpec,
    train: Sequence[Example],
    test: Sequence[Example],
    others: Sequence[Example] = (),
) -> Task:
    """Returns a task whose splits know nothing of one another.

    A fifth of the training rows, at most 100, become the validation slice, by a seeded draw. Rows
    that repeat one another or a held-back row, or that hold or lie inside one of five words or
    more, are left out and counted in `n_dropped`. Case, spacing and punctuation are ignored, but
    between rows of different labels, which these may tell apart ("3 < 5", "3 > 5"), only spacing.

    Args:
        spec: how the task reads.
        train: rows to train and to validate on.
        test: rows to test on, all of which stay.
        others: rows of other tasks that training and validation must not know either.

    Raises:
        ValueError: training rows of one class alone are left.
    """
    groups, repeats = _without_repeats(train)
    unique = [row for group in groups for row in group]
    known = {**_clashes(unique, others), **_clashes(unique, test, have_same_labels=True)}
    free = [row for row in unique if id(row) not in known]
    validation = _validation_slice(groups, free)
    drawn = {id(row) for row in validation}
    undrawn = [row for row in free if id(row) not in drawn]
    # A training row may still hold a row that the validation slice took, or lie inside one.
    shared = _clashes(undrawn, validation, have_same_labels=True)
    kept_rows = [row for row in undrawn if id(row) not in shared]
    dropped = [*repeats, *known.values(), *shared.values()]
    labels = {row.label for row in kept_rows}
    if len(labels) < 2:
        left_out = ""
        if dropped:
            left_out = f" ({len(dropped)} that repeat one another or a held-back row are left out)"
        raise ValueError(
            f"task {spec.name!r}: expected training rows of two classes or more, "
            f"got {len(kept_rows)} of label {sorted(labels)}{left_out}: add rows of another class"
        )
    return Task(
        spec,
        tuple(kept_rows),
        tuple(test),
        tuple(validation),
        n_dropped=len(dropped),
        dropped_example=_most_telling(dropped),
    )


def _most_telling(dropped: Sequence[Clash]) -> Clash | None:
    """Returns the first row that was left out for another text than its own, or else the first."""
    for row, other in dropped:
        if _row_texts(row) != _row_texts(other):
            return row, other
    return dropped[0] if dropped else None


def _without_repeats(rows: Sequence[Example]) -> tuple[list[list[Example]], list[Clash]]:
    """Returns the rows of each key that repeat none before them, and those that do.

    The keys are ordered by where each comes last: every split drawn so far rests on this order.
    """
    group_by_key: dict[str, list[Example]] = {}
    repeats = []
    for row in rows:
        key = row_key(row)
        # Put back, the key is the last.
        group = group_by_key.pop(key, [])
        group_by_key[key] = group
        for first in group:
            if _is_repeat(row, first):
                repeats.append((row, first))
                break
        else:
            group.append(row)
    return list(group_by_key.values()), repeats


def _validation_slice(
    groups: Sequence[Sequence[Example]], free: Sequence[Example]
) -> list[Example]:
    """Returns a seeded draw from the free ones of unique rows, in the order of these.

    Rows of one key are drawn one after the other, so that a slice of pairs that differ in a sign
    has both.
    """
    # By identity: a row holds a dictionary, and cannot be hashed.
    free_ids = {id(row) for row in free}
    candidates = []
    n_unique = 0
    for place in np.random.default_rng(_SEED).permutation(len(groups)):
        n_unique += len(groups[place])
        candidates += [row for row in groups[place] if id(row) in free_ids]
    if n_unique < _FEW:
        # None of a class's few rows may be its last, so each class keeps its first.
        first_ids: dict[int, int] = {}
        for row in free:
            first_ids.setdefault(row.label, id(row))
        kept_back = set(first_ids.values())
        candidates = [row for row in candidates if id(row) not in kept_back]
    n_drawn = min(N_VALIDATION, len(free) // 5)
    drawn = {id(row) for row in candidates[:n_drawn]}
    return [row for row in free if id(row) in drawn]


def apart(rows: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """Returns the rows that repeat no held-back row, hold no long one, and lie in none if long.

    The held-back rows may be another task's: labels are not looked at.
    """
    clashes = _clashes(rows, held)
    return [row for row in rows if id(row) not in clashes]


def _clashes(
    rows: Sequence[Example], held: Sequence[Example], have_same_labels: bool = False
) -> dict[int, Clash]:
    """Returns by its id each row that `apart` leaves out, with the held-back row that it repeats.

    Args:
        rows: may be left out.
        held: held-back rows.
        have_same_labels: whether labels mean the same in both, so that rows of different labels
            need more in common.
    """
    held_by_key: defaultdict[str, list[Example]] = defaultdict(list)
    for row in held:
        held_by_key[row_key(row)].append(row)
    long_held = [row for row in held if is_long(_row_text(row))]
    long_held_keys = [row_key(row) for row in long_held]
    keys = [row_key(row) for row in rows]
    held_inside = inside(long_held_keys, keys)
    held_around = _long_held_around(rows, keys, long_held_keys)

    clashes = {}
    for place, row in enumerate(rows):
        long_places = sorted(held_inside[place] | held_around[place])
        alike = [*held_by_key.get(keys[place], ()), *(long_held[i] for i in long_places)]
        for other in alike:
            if not have_same_labels or _is_repeat(row, other):
                clashes[id(row)] = (row, other)
                break
    return clashes


def _is_repeat(row: Example, other: Example) -> bool:
    """Returns whether one of two rows whose keys are alike, or one in the other, repeats the other.

    Rows of different labels do where they have the same text, spacing aside, or where one is a
    piece of the other, word by word: a phrase of a held-back row may well have a label of its own.
    """
    have_one_key = row_key(row) == row_key(other)
    if row.label != other.label:
        if have_one_key:
            return _parts(row, _UNSPACED) == _parts(other, _UNSPACED)
        words = _spaced_words(row)
        other_words = _spaced_words(other)
        return words in other_words or other_words in words
    # A key runs digits together: "2 < 15" has that of "21 > 5".
    return not have_one_key or _parts(row, _NUMBER) == _parts(other, _NUMBER)


def _parts(row: Example, part: re.Pattern[str]) -> list[list[str]]:
    """Returns the parts of each of a row's texts."""
    return [part.findall(text) for text in _row_texts(row)]


def _spaced_words(row: Example) -> str:
    """Returns the words of a row's texts in lower case, with one space around each."""
    lines = []
    for words in _parts(row, _BARE_WORD):
        lines.append(f" {' '.join(words).lower()} ")
    return "\n".join(lines)


def _long_held_around(
    rows: Sequence[Example], keys: Sequence[str], held_keys: Sequence[str]
) -> list[set[int]]:
    """Returns for each row the places of the held-back ones that it lies inside, if it is long."""
    long_places = [place for place, row in enumerate(rows) if is_long(_row_text(row))]
    long_keys = [keys[place] for place in long_places]
    around: list[set[int]] = [set() for _ in rows]
    for held_place, indices in enumerate(inside(long_keys, held_keys)):
        for index in indices:
            around[long_places[index]].add(held_place)
    return around


def _row_texts(row: Example) -> list[str]:
    return [*row.fields.values(), *row.choices]


def _row_text(row: Example) -> str:
    return " ".join(_row_texts(row))


def row_key(row: Example) -> str:
    """Returns what two rows have alike where one may repeat the other, their labels aside."""
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
