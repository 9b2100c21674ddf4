"""Drawing: the prompts that a task gives to an extraction, as a fit's settings have them.

Whatever is asked of them, they are of the same queries and demonstrations, so that what differs
between two fits is what was asked.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from icrouting.config import FitConfig
from icrouting.tasks.prompts import Prompt, behind, shared_episodes, zero_shot
from icrouting.tasks.task import Example, Task


def drawn_prompts(
    task: Task, config: FitConfig, rng: np.random.Generator, n_prompts: int
) -> Iterator[Prompt]:
    """Yields the first `n_prompts` extraction prompts of a task, drawn by `rng` (section 2)."""
    # Beside `rng`, whose draws are thus those of the prompts whose answers stay.
    (answers_rng,) = rng.spawn(1)
    episodes = shared_episodes(
        task, n_prompts, config.demos_per_class, rng, config.queries_per_context
    )
    for queries, demos in episodes:
        answers = [task.answer(demo) for demo in demos]
        if config.extract_from == "shuffled":
            answers = shuffled_answers(task, demos, answers_rng)
        turns = []
        for demo, answer in zip(demos, answers, strict=True):
            turns.append((task.question(demo), answer))
        for query in queries:
            is_alone = config.extract_from == "zero-shot"
            yield zero_shot(task, query) if is_alone else behind(task, query, turns)


def shuffled_answers(task: Task, demos: Sequence[Example], rng: np.random.Generator) -> list[str]:
    """Returns the demonstrations' answers in a random order, which may leave some in place.

    Among those alone that choose from the same options, so that each has an answer that it offers.
    """
    places_by_options: dict[tuple[str, ...], list[int]] = {}
    for place, demo in enumerate(demos):
        places_by_options.setdefault(task.options(demo), []).append(place)
    answers = [task.answer(demo) for demo in demos]
    shuffled = list(answers)
    for places in places_by_options.values():
        for place, other in zip(places, rng.permutation(places), strict=True):
            shuffled[place] = answers[other]
    return shuffled
