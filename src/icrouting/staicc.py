"""Seven text classification sets of the pinned wheel StaICC, split anew and without leaks between splits.

The wheel holds official train rows, for agnews, trec and emotion mixed with the official test rows, so the
splits made here are our own: seeded, without duplicates, and the same on every machine.

Movie reviews need more care. SST-2 is made of sentences and of phrases cut from them, and nearly all of its
sentences are rows of SST-5 and MR as well. So whole sentences are dealt out: some to the test split of SST-2,
some, with all their phrases, to its train split, and MR and SST-5 keep the rows that share no text with
either. MR and SST-5 overlap one another: use each of them with its own test split.
"""

import pickle
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from icrouting import assets
from icrouting.tasks import Example, Task, TaskSpec, parse_row

_FILES = {
    "agnews": "agnews",
    "sst2": "sst2",
    "trec": "trec",
    "sst5": "sst5",
    "mr": "rotten_tomatoes",
    "subj": "subjective",
    "emotion": "tweet_eval_emotion",
}
_SEED = 0
_MAX_TEST = 2000
_MAX_TRAIN = 6000
_MAX_TRAIN_AGNEWS = 12000
# Sentences dealt to SST-2: as many for testing as in its official test split, about, and enough for
# training to fill the cap with their phrases. More would only take rows from MR and SST-5.
_N_TEST_SENTENCES = 1000
_N_TRAIN_SENTENCES = 1200
# A phrase shorter than this, in words, is common property ("a good film") and says nothing of its source.
_MIN_WORDS = 5
_WORD = re.compile(r"\S*[^\W_]\S*")
# What a damaged pickle raises, beside UnpicklingError, is whatever its opcodes stumble upon.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
_NOT_KEY = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789"))


class _Row(NamedTuple):
    """A text, what identifies it with case, spacing and punctuation ignored, and its label."""

    text: str
    key: str
    label: int


class _DataUnpickler(pickle.Unpickler):
    """Builds lists, tuples, texts and numbers; a pickle that asks for anything else is refused unbuilt."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Refuses every class and function, so no code of the file can run."""
        raise pickle.UnpicklingError(f"it asks for the code {module_name}.{global_name}")


def read_task(spec: TaskSpec) -> Task:
    """Returns a task with the rows of the pinned wheel: 20 % of them, at most 2,000, for testing.

    Differs: the paper uses the official splits, which the wheel does not tell apart. SST-2 is tested on
    whole sentences, like the official test split, and trained on phrases of five words or more.

    Args:
        spec: a task by the name of one of the seven sets, with `text` as its only field.

    Raises:
        ValueError: the wheel has no such set, the spec does not fit its rows, or the file is damaged.
        OSError: the wheel could not be fetched.
    """
    if spec.name not in _FILES:
        raise ValueError(
            f"the pinned data 'pinned:staicc' holds {', '.join(_FILES)}, got task {spec.name!r}: give "
            f'data="folder", a folder with {spec.name}/train.jsonl and {spec.name}/test.jsonl'
        )
    folder = assets.fetch("staicc")
    rows = _read_rows(folder, spec.name)
    rng = np.random.default_rng(_SEED)
    if spec.name == "sst2":
        train, test = _deal_reviews(rows, rng)
    else:
        if spec.name in ("mr", "sst5"):
            dealt = _deal_reviews(_read_rows(folder, "sst2"), np.random.default_rng(_SEED))
            rows = _unrelated(rows, [*dealt[0], *dealt[1]])
        train, test = _split(rows, _MAX_TRAIN_AGNEWS if spec.name == "agnews" else _MAX_TRAIN, rng)
    return Task(spec, _examples(train, spec), _examples(test, spec))


def _examples(rows: Sequence[_Row], spec: TaskSpec) -> tuple[Example, ...]:
    return tuple(parse_row({"text": row.text, "label": row.label}, spec) for row in rows)


def _read_rows(folder: Path, name: str) -> list[_Row]:
    """Returns the rows of one set that are not empty, one per key, unless the labels of a key differ."""
    rows: dict[str, _Row] = {}
    conflicting = set()
    for text, label in _unpickle(folder / f"{_FILES[name]}.dataset"):
        key = _key(text)
        first = rows.setdefault(key, _Row(text.strip(), key, label))
        if first.label != label:
            conflicting.add(key)
    return [row for key, row in rows.items() if key and key not in conflicting]


def _key(text: str) -> str:
    """Returns the letters and digits of a text in lower case, without the treebank's names of brackets.

    Letters with accents are dropped, since the sets spell them in different encodings.
    """
    plain = text.lower().replace("-lrb-", "").replace("-rrb-", "").encode("ascii", "ignore")
    return plain.translate(None, _NOT_KEY).decode("ascii")


def _unpickle(path: Path) -> list[tuple[str, int]]:
    """Returns the texts and labels of a pickled list of `([text], label)`, running none of its code."""
    try:
        with path.open("rb") as file:
            rows = _DataUnpickler(file).load()
        pairs = [(text, label) for (text,), label in rows]
    except _DAMAGE as error:
        raise ValueError(f"{_expected(path)}: {error}") from error
    if not all(type(text) is str and type(label) is int for text, label in pairs):
        raise ValueError(f"{_expected(path)}: other types in its rows")
    return pairs


def _expected(path: Path) -> str:
    return f"expected pickled rows of ([text], label); delete {path.parent} to fetch them anew; got {path.name}"


def _split(rows: Sequence[_Row], max_train: int, rng: np.random.Generator) -> tuple[list[_Row], list[_Row]]:
    """Returns the train and the test rows, both in random order."""
    n_test = min(_MAX_TEST, len(rows) // 5)
    order = rng.permutation(len(rows))
    return [rows[i] for i in order[n_test : n_test + max_train]], [rows[i] for i in order[:n_test]]


def _deal_reviews(rows: Sequence[_Row], rng: np.random.Generator) -> tuple[list[_Row], list[_Row]]:
    """Returns the train and the test rows of SST-2: no row of either lies inside a row of the other.

    A sentence is a row that lies inside no other. Phrases that occur in a test sentence are left out of the
    train rows, whichever sentence they come from; a train row cannot hold a test sentence by definition.
    """
    rows = [row for row in rows if _is_long(row)]
    keys = [row.key for row in rows]
    inside = _inside(keys, keys)
    phrases = {i for outer, found in enumerate(inside) for i in found if i != outer}
    sentences = rng.permutation([i for i in range(len(rows)) if i not in phrases])
    test = sentences[:_N_TEST_SENTENCES]
    dealt = sentences[_N_TEST_SENTENCES : _N_TEST_SENTENCES + _N_TRAIN_SENTENCES]
    tested = {i for sentence in test for i in inside[sentence]}
    train = rng.permutation(sorted({i for sentence in dealt for i in inside[sentence]} - tested))
    return [rows[i] for i in train[:_MAX_TRAIN]], [rows[i] for i in test]


def _unrelated(rows: Sequence[_Row], others: Sequence[_Row]) -> list[_Row]:
    """Returns the rows that hold no long row of `others` and, if long themselves, lie inside none."""
    others = [row for row in others if _is_long(row)]
    holds = _inside([row.key for row in others], [row.key for row in rows])
    long = [row.key for row in rows if _is_long(row)]
    held = {long[i] for found in _inside(long, [row.key for row in others]) for i in found}
    return [row for row, found in zip(rows, holds, strict=True) if not found and row.key not in held]


def _is_long(row: _Row) -> bool:
    return len(_WORD.findall(row.text)) >= _MIN_WORDS


def _inside(inner: Sequence[str], outer: Sequence[str]) -> list[set[int]]:
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
            alike = starting.get(text[start : start + width])
            if alike:
                hits.update(i for i in alike if text.startswith(inner[i], start))
        found.append(hits)
    return found
