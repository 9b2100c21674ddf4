"""Splits: a validation slice carved from train, and no training row that a held-back row repeats."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from icrouting.tasks.task import Example, Task, TaskSpec

N_VALIDATION = 100
_SEED = 0
_FEW = 50
# A phrase shorter than this, in words, is common property ("a good film") and says nothing of its source.
_MIN_WORDS = 5
_WORD = re.compile(r"\S*[^\W_]\S*")
_NOT_KEY = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789"))


def make_task(
    spec: TaskSpec,
    train: Sequence[Example],
    test: Sequence[Example],
    others: Sequence[Example] = (),
) -> Task:
    """Returns a task whose splits know nothing of one another, nor training and validation rows of `others`.

    A fifth of the training rows, at most 100, become the validation slice, by a seeded draw. Training rows
    that repeat one another or a held-back row (case, spacing and punctuation ignored), or that hold or lie
    inside one of five words or more, are left out and counted in `n_dropped`. ValueError if one class alone is left.
    """
    unique = list({_row_key(example): example for example in reversed(train)}.values())[::-1]
    free = {id(example) for example in apart(unique, [*test, *others])}
    order = np.random.default_rng(_SEED).permutation(len(unique))
    candidates = [int(i) for i in order if id(unique[i]) in free]
    if len(unique) < _FEW:  # none of a class's few rows may be its last
        firsts = {unique[i].label: i for i in sorted(candidates, reverse=True)}
        candidates = [i for i in candidates if i not in firsts.values()]
    chosen = set(candidates[: min(N_VALIDATION, len(free) // 5)])
    validation = tuple(unique[i] for i in sorted(chosen))
    kept = apart(
        [row for i, row in enumerate(unique) if id(row) in free and i not in chosen], validation
    )
    labels = {example.label for example in kept}
    if len(labels) < 2:
        raise ValueError(
            f"task {spec.name!r}: expected training rows of two classes or more, got {len(kept)} of label "
            f"{sorted(labels)}: add rows of another class"
        )
    return Task(
        spec, tuple(kept), tuple(test), validation, len(train) - len(kept) - len(validation)
    )


def apart(rows: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """Returns the rows that repeat no held-back row, hold no long one, and lie inside none if long."""
    keys = [_row_key(row) for row in rows]
    exact = {_row_key(row) for row in held}
    long_held = [_row_key(row) for row in held if is_long(_row_text(row))]
    holds = inside(long_held, keys)
    long = [place for place, row in enumerate(rows) if is_long(_row_text(row))]
    out = {place for place, key in enumerate(keys) if key in exact or holds[place]}
    out |= {long[i] for found in inside([keys[place] for place in long], long_held) for i in found}
    return [row for place, row in enumerate(rows) if place not in out]


def _row_text(example: Example) -> str:
    return " ".join([*example.fields.values(), *example.choices])


def _row_key(example: Example) -> str:
    return "\n".join(map(_field_key, (*example.fields.values(), *example.choices)))


def _field_key(text: str) -> str:
    """The key of a text, which keeps its letters where many are not Latin."""
    letters = "".join(filter(str.isalnum, text.lower()))
    is_latin = 10 * sum(not letter.isascii() for letter in letters) <= len(letters)
    return (text_key(text) if is_latin else letters) or text


def text_key(text: str) -> str:
    """Returns the letters and digits of a text in lower case, without the treebank's names of brackets.

    Letters with accents are dropped, since data sets spell them in different encodings.
    """
    plain = text.lower().replace("-lrb-", "").replace("-rrb-", "").encode("ascii", "ignore")
    return plain.translate(None, _NOT_KEY).decode("ascii")


def is_long(text: str) -> bool:
    """Returns whether a text has five words or more."""
    return len(_WORD.findall(text)) >= _MIN_WORDS


def inside(inner: Sequence[str], outer: Sequence[str]) -> list[set[int]]:
    """Returns for each key of `outer` the indices of the keys of `inner` that it contains.

    Comparing all pairs would take minutes. The first characters of the inner keys, as many as the shortest
    one has, are looked up at every position of an outer key, and only what starts alike is compared.
    """
    width = min(map(len, inner), default=1)
    starting: defaultdict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(inner):
        starting[key[:width]].append(i)
    found = []
    for text in outer:
        hits: set[int] = set()
        for start in range(len(text) - width + 1):
            if alike := starting.get(text[start : start + width]):
                hits.update(i for i in alike if text.startswith(inner[i], start))
        found.append(hits)
    return found
