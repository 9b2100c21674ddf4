"""Seven classification sets of the pinned wheel StaICC, split anew, without leaks between splits.

The wheel holds official train rows, for agnews, trec and emotion mixed with the official test rows,
so the splits made here are our own: seeded, without duplicates, and the same on every machine.

Movie reviews need more care. SST-2 is made of sentences and of phrases cut from them, and nearly
all of its sentences are rows of SST-5 and MR as well. So whole sentences are dealt out: some to the
test split of SST-2, some, with all their phrases, to its train split, and MR and SST-5 keep the
rows that share no text with either. MR and SST-5 overlap one another: use each of them with its own
test split.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from icrouting.runtime import wheels
from icrouting.tasks.catalogue import MAX_TEST, MAX_TRAIN, SPECS, STAICC
from icrouting.tasks.rows import parse_row
from icrouting.tasks.splits import apart, inside, is_long, make_task, text_key
from icrouting.tasks.task import Example, Task, TaskSpec

_SEED = 0
# Sentences dealt to SST-2: for testing about as many as in its official test split, for training
# enough to fill the cap with their phrases. More would only take rows from MR and SST-5.
_N_TEST_SENTENCES = 1000
_N_TRAIN_SENTENCES = 1200


class _DataUnpickler(pickle.Unpickler):
    """Builds lists, tuples, texts and numbers; a pickle that asks for more is refused unbuilt."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Refuses every class and function, so no code of the file can run."""
        raise pickle.UnpicklingError(f"it asks for the code {module_name}.{global_name}")


def read_task(spec: TaskSpec) -> Task:
    """Returns a task with the rows of the pinned wheel: 20 % of them, at most 2,000, for testing.

    Differs: the paper uses the official splits, which the wheel does not tell apart. SST-2 is
    tested on whole sentences, like the official test split, and trained on phrases of five words or
    more.

    Raises:
        ValueError: the wheel does not hold the task, or its file is damaged.
    """
    if spec.name not in STAICC:
        raise ValueError(
            f"the pinned data 'pinned:staicc' holds {', '.join(STAICC)}, got task {spec.name!r}: "
            f'give data="folder", a folder with {spec.name}/train.jsonl and {spec.name}/test.jsonl'
        )
    folder = wheels.fetch("staicc")
    rows = _read_rows(folder, spec)
    rng = np.random.default_rng(_SEED)
    if spec.name == "sst2":
        train, test = _deal_reviews(rows, rng)
        return make_task(spec, train, test)
    if spec.name in ("mr", "sst5"):
        # The same draw as SST-2's own, so that what it was dealt is known here.
        reviews = _read_rows(folder, SPECS["sst2"])
        sst2_train, sst2_test = _deal_reviews(reviews, np.random.default_rng(_SEED))
        rows = apart(rows, [*sst2_train, *sst2_test])
    n_test = min(MAX_TEST, len(rows) // 5)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    test = shuffled[:n_test]
    train = shuffled[n_test : n_test + MAX_TRAIN[spec.name]]
    return make_task(spec, train, test)


def _read_rows(folder: Path, spec: TaskSpec) -> list[Example]:
    """Returns the rows of one set that are not empty, one per key.

    A key whose rows have different labels gives none: which of them is right cannot be told.
    """
    row_by_key: dict[str, Example] = {}
    conflicting = set()
    for text, label in _unpickle(folder / f"{STAICC[spec.name]}.dataset"):
        key = text_key(text)
        if not key:
            continue
        row = parse_row({"text": text.strip(), "label": label}, spec)
        first_row = row_by_key.setdefault(key, row)
        if first_row.label != label:
            conflicting.add(key)
    return [row for key, row in row_by_key.items() if key not in conflicting]


def _unpickle(path: Path) -> list[tuple[str, int]]:
    """Returns the texts and labels of a pickled list of `([text], label)`; its code never runs."""
    try:
        with path.open("rb") as file:
            rows = _DataUnpickler(file).load()
        pairs = [(text, label) for (text,), label in rows]
        if not all(type(text) is str and type(label) is int for text, label in pairs):
            raise ValueError("other types in its rows")
    # A damaged pickle raises whatever its opcodes stumble upon.
    except Exception as error:
        raise ValueError(
            f"expected pickled rows of ([text], label); delete {path.parent} to fetch them anew; "
            f"got {path.name}: {error}"
        ) from error
    return pairs


def _deal_reviews(
    rows: Sequence[Example], rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Returns the train and the test rows of SST-2.

    No row of either lies inside a row of the other. A sentence is a row that lies inside no other.
    Phrases that occur in a test sentence are left out of the train rows, whichever sentence they
    come from; a train row cannot hold a test sentence by definition.
    """
    rows = [row for row in rows if is_long(row.fields["text"])]
    keys = [text_key(row.fields["text"]) for row in rows]
    # Of each row the indices of all rows inside it, among them its own.
    contained = inside(keys, keys)
    phrases = set()
    for outer, indices in enumerate(contained):
        phrases |= indices - {outer}
    whole = [i for i in range(len(rows)) if i not in phrases]
    sentences = rng.permutation(whole).tolist()
    n_dealt = _N_TEST_SENTENCES + _N_TRAIN_SENTENCES
    test_sentences = sentences[:_N_TEST_SENTENCES]
    train_sentences = sentences[_N_TEST_SENTENCES:n_dealt]
    tested = _all_inside(test_sentences, contained)
    trained = _all_inside(train_sentences, contained) - tested
    order = rng.permutation(sorted(trained))[: MAX_TRAIN["sst2"]]
    return [rows[i] for i in order], [rows[i] for i in test_sentences]


def _all_inside(sentences: Sequence[int], contained: Sequence[set[int]]) -> set[int]:
    """Returns the indices of all rows that lie inside one of some sentences."""
    indices: set[int] = set()
    for sentence in sentences:
        indices |= contained[sentence]
    return indices
