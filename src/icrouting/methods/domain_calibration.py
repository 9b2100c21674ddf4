"""Domain-context calibration: what a model answers to random words of the task's own prompts."""

import zlib
from collections.abc import Iterable

import numpy as np

from icrouting.methods.calibration import Calibration
from icrouting.tasks.task import Example, Task

# Texts of random words, as published.
N_TEXTS = 20


class DomainCalibration(Calibration):
    """Zero-shot, corrected for what the model answers to random words (Fei et al. 2023).

    p_i / p_dc_i with p_dc the mean of the normalised option probabilities over N_TEXTS texts, in
    every field and choice as many words as it has on average, drawn from the task's training rows,
    of which no label is read. Contextual calibration has content-free texts in their place.
    """

    name = "domain-calibration"
    draws = True

    def blanks(self, task: Task, example: Example) -> list[Example]:
        """Returns texts of random words, with as many choices as an example has.

        Raises:
            ValueError: the task has no training rows to draw words from.
        """
        if not task.train:
            raise ValueError(
                f"{self.name} draws words from a task's training rows, and {task.name!r} has none"
            )
        # By the task's name, not by the order in which tasks are met.
        rng = np.random.default_rng([self.entropy, zlib.crc32(task.name.encode())])
        field_texts = {name: [row.fields[name] for row in task.train] for name in example.fields}
        choice_texts = [choice for row in task.train for choice in row.choices]
        blanks = []
        for _ in range(N_TEXTS):
            fields = {name: drawn_text(texts, rng) for name, texts in field_texts.items()}
            choices = tuple(drawn_text(choice_texts, rng) for _ in example.choices)
            # An example needs a label; that of a blank is never looked at.
            blanks.append(Example(fields, choices, label=0))
        return blanks


def drawn_text(texts: Iterable[str], rng: np.random.Generator) -> str:
    """Returns as many words as texts have on average, drawn from all of theirs."""
    lists = [text.split() for text in texts]
    words = [word for words in lists for word in words]
    # A column may be empty throughout.
    if not words:
        return ""
    n_words = max(1, round(len(words) / len(lists)))
    return " ".join(str(word) for word in rng.choice(words, n_words))
