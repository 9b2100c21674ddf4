"""Sources: what a router knows of the tasks that it was fitted on, and of prompts unlike theirs."""

import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerBase

from icrouting.config import FitConfig
from icrouting.routing.encoder import query_texts
from icrouting.tasks.task import Task

# Training rows whose prompts are looked at for their lines, and for an example that is short.
N_ROWS = 200
# Characters of a prompt's beginning and of its end that a warning shows.
N_SHOWN = 40


@dataclass(frozen=True)
class Source:
    """A task that a router was fitted on.

    Attributes:
        name: the task's.
        template: its prompt, with `{field}` slots.
        options: the answers that the example chooses from; letters, where each row of the task
            brings its own choices.
        example: the prompt of one of the training rows.
        n_lines: how many lines its prompts have; None where they differ in that.
        n_prompts: few-shot prompts that the directions were drawn from.
        n_demos: demonstrations in front of each of them, at most.
        n_queries: zero-shot prompts that the router was trained on.
    """

    name: str
    template: str
    options: tuple[str, ...]
    example: str
    n_lines: PositiveInt | None
    n_prompts: PositiveInt
    n_demos: NonNegativeInt
    n_queries: PositiveInt

    @property
    def fixed_texts(self) -> list[str]:
        """What stands before, between and behind the slots of the template."""
        texts = [""]
        for text, slot, _, _ in string.Formatter().parse(self.template):
            texts[-1] += text
            if slot is not None:
                texts.append("")
        return texts

    @property
    def cue(self) -> str:
        """What stands behind the last slot, up to the answer."""
        return self.fixed_texts[-1]

    def has_form(self, prompt: str) -> bool:
        """Returns whether a prompt is the template with texts in its slots, and nothing else."""
        if self.n_lines is not None and prompt.count("\n") + 1 != self.n_lines:
            return False
        first, *others = self.fixed_texts
        # A template without a slot is one text alone.
        if not others:
            return prompt == first
        *middle, last = others
        start = len(first)
        end = len(prompt) - len(last)
        if not (prompt.startswith(first) and prompt.endswith(last) and start <= end):
            return False
        # The leftmost place leaves most room for the texts to come: one search each is enough.
        for text in middle:
            place = prompt.find(text, start, end)
            if place < 0:
                return False
            start = place + len(text)
        return True


def sources_of(tasks: Sequence[Task], fit: FitConfig) -> tuple[Source, ...]:
    """Returns what a router is to know of the tasks that it is fitted on."""
    sources = []
    for task in tasks:
        rows = task.train[:N_ROWS]
        prompts = [task.prompt(row) for row in rows]
        # An example is to be read: of these, the shortest.
        shortest = min(range(len(rows)), key=lambda place: len(prompts[place]))
        line_counts = {prompt.count("\n") + 1 for prompt in prompts}
        _, class_sizes = np.unique(task.train_labels, return_counts=True)
        source = Source(
            name=task.name,
            template=task.spec.template,
            options=task.options(rows[shortest]),
            example=prompts[shortest],
            n_lines=line_counts.pop() if len(line_counts) == 1 else None,
            n_prompts=min(fit.n_prompts, len(task.train)),
            n_demos=int(np.minimum(class_sizes, fit.demos_per_class).sum()),
            n_queries=min(fit.n_queries, len(task.train)),
        )
        sources.append(source)
    return tuple(sources)


class FormWatch:
    """Warns, once, of a prompt that has the form of none of a router's sources.

    One line above the template is enough for a router to do harm where it had helped.

    Args:
        sources: the tasks that the router was fitted on.
        tokenizer: gives the texts of tokens.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase):
        self._sources = sources
        self._tokenizer = tokenizer
        # A tokenizer that changes a text says nothing of its form.
        examples = [source.example for source in sources]
        token_lists = tokenizer(examples).input_ids
        self._is_over = query_texts(tokenizer, token_lists) != examples

    def look_at(self, token_lists: Sequence[Sequence[int]]) -> None:
        """Looks at the first of some prompts; after a warning, at none."""
        if self._is_over or not token_lists:
            return
        (prompt,) = query_texts(self._tokenizer, token_lists[:1])
        if any(source.has_form(prompt) for source in self._sources):
            return
        self._is_over = True
        warnings.warn(_unlike(prompt, self._sources), stacklevel=2)


def _unlike(prompt: str, sources: Sequence[Source]) -> str:
    """What is said of a prompt that has the form of no source."""
    names = ", ".join(source.name for source in sources)
    # What is likeliest meant is the task whose cue it ends with.
    nearest = next((source for source in sources if prompt.endswith(source.cue)), sources[0])
    shown = repr(prompt)
    if len(prompt) > 2 * N_SHOWN:
        shown = f"{prompt[:N_SHOWN]!r} ... {prompt[-N_SHOWN:]!r}"
    return (
        "this prompt has the form of none of the tasks that the router was fitted on "
        f"({names}): it reads {shown}, where {nearest.name} reads {nearest.template!r}. "
        "What routing does to it was not learned and may do harm: for one of these tasks, give "
        "the template's own text and nothing around it; for another task, measure with `icr eval`"
    )
