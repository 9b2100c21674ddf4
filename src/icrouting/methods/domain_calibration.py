"""Domain-context calibration: option probabilities divided by those on random words of the task."""

import zlib
from collections.abc import Sequence

import numpy as np

from icrouting.methods.calibration import Calibration
from icrouting.tasks.task import Example, Task, rows_digest

N_TEXTS = 20


class DomainCalibration(Calibration):
    """Zero-shot, corrected for what the model answers to the task's words in no order.

    Fei et al. 2023: log p_i - log p_d_i with p_d the mean of the normalised option probabilities
    over 20 texts. Every field's text is of that field's words in the training rows, drawn at random
    with their frequencies, and of its mean length there; choices are made alike, of all choices'
    words. No label is read. Differs: the paper draws words of the test inputs; these are the
    training rows', so that no answer depends on other test items.
    """

    name = "domain-calibration"
    draws = True

    def learn(self, rng: np.random.Generator) -> None:
        """Learns nothing from the source tasks."""
        super().learn(rng)
        # By identity, since to digest a task's rows takes longer than to answer one. The task
        # stands beside its key, so that no other takes its place in memory.
        self._keys: dict[int, tuple[Task, str]] = {}

    def _key(self, task: Task) -> str:
        if id(task) not in self._keys:
            key = rows_digest([Task(task.spec, task.train, ())])
            self._keys[id(task)] = task, f"{task.name} {key}"
        return self._keys[id(task)][1]

    def _blanks(self, task: Task, example: Example) -> list[Example]:
        """Returns examples of random words, with the fields and number of choices of this one."""
        if not task.train:
            raise ValueError(
                f"{self.name} draws words from the training rows of {task.name!r}, which has none: "
                "give it rows, with any labels"
            )
        n_choices = len(example.choices)
        # By the task's name, not by the order in which tasks are met.
        rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
        words_by_field = {}
        for field in example.fields:
            words_by_field[field] = [str(row.fields.get(field, "")).split() for row in task.train]
        choice_words = [choice.split() for row in task.train for choice in row.choices]
        blanks = []
        for _ in range(N_TEXTS):
            fields = {field: _drawn(texts, rng) for field, texts in words_by_field.items()}
            choices = tuple(_drawn(choice_words, rng) for _ in range(n_choices))
            blanks.append(Example(fields, choices, label=0))
        return blanks


def _drawn(texts: Sequence[Sequence[str]], rng: np.random.Generator) -> str:
    """Returns words of some texts at random, as many as a text has on average."""
    words = [word for text in texts for word in text]
    # A field may be empty in every row.
    if not words:
        return ""
    n_words = max(1, round(len(words) / len(texts)))
    places = rng.integers(len(words), size=n_words)
    return " ".join(words[place] for place in places)
