"""Contextual calibration: option probabilities divided by those on content-free inputs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.scoring import score
from icrouting.methods.base import Method, Scores
from icrouting.tasks.prompts import zero_shot
from icrouting.tasks.task import Example, Task, rows_digest

CONTENT_FREE = ("N/A", "[MASK]", "")


class Calibration(Method):
    """Zero-shot, corrected for what the model answers when nothing is asked (Zhao et al. 2021).

    p_i / p_cf_i with p_cf the mean of the normalised option probabilities over content-free
    inputs, which stand in every field and choice. Where examples bring their own choices, p_cf is
    taken per number of choices.
    """

    name = "calibration"
    draws = False
    reads_sources = False
    reads_fields = True

    def learn(self, rng: np.random.Generator) -> None:
        """Learns nothing from the source tasks."""
        # By how a task reads, since tasks may share a name, and the number of choices.
        self._levels: dict[tuple[str, int], Float[Tensor, "n_options"]] = {}

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns log p_i - log p_cf_i, up to a constant per example."""
        # Beyond an example's own options the scores are -inf, which a level of 0 leaves alone.
        levels = torch.zeros_like(scores)
        key = self._key(task)
        for row, example in enumerate(examples):
            level = self._level_by(key, task, example)
            levels[row, : len(level)] = level
        return scores - levels

    def _level(self, task: Task, example: Example) -> Float[Tensor, "n_options"]:
        """Returns log p_cf of the options that an example of a task has."""
        return self._level_by(self._key(task), task, example)

    def _level_by(self, task_key: str, task: Task, example: Example) -> Float[Tensor, "n_options"]:
        key = task_key, len(example.choices)
        if key not in self._levels:
            blanks = self._blanks(task, example)
            prompts = []
            for blank in blanks:
                prompt = zero_shot(task, blank)
                # Behind a field at the template's end, the empty one leaves a bare space; a chat's
                # prompt ends as its template does.
                if not task.spec.chat:
                    prompt = replace(prompt, query=prompt.query.rstrip())
                prompts.append(prompt)
            options = [task.options(blank) for blank in blanks]
            scores = score(self.decoder, prompts, options, label_scoring=task.spec.label_scoring)
            levels = scores.softmax(-1).mean(0).log()
            # Long labels' summed log-probabilities may lie further apart than a probability can.
            exact = scores.double().log_softmax(-1).logsumexp(0) - math.log(len(scores))
            self._levels[key] = torch.where(levels.isfinite(), levels, exact.to(levels))
        return self._levels[key]

    def _key(self, task: Task) -> str:
        """Returns what a task's blanks depend on."""
        return rows_digest([Task(task.spec, (), ())])

    def _blanks(self, task: Task, example: Example) -> list[Example]:
        """Returns examples without content, of the fields and number of choices of this one."""
        n_choices = len(example.choices)
        # An example needs a label; that of a blank is never looked at.
        blanks = []
        for text in CONTENT_FREE:
            fields = dict.fromkeys(example.fields, text)
            blanks.append(Example(fields, (text,) * n_choices, label=0))
        return blanks
