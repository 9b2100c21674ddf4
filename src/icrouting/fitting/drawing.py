"""Drawing: the prompts that a task gives to an extraction, as a fit's settings have them.

Whatever is asked of them, they are of the same queries and demonstrations, so that what differs
between two fits is what was asked.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.routing.encoder import SentenceEncoder, load_encoder
from icrouting.routing.features import sentence_encoder
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import Prompt, behind, shared_episodes, zero_shot
from icrouting.tasks.task import Example, Task

# From the places of queries and their balanced demonstrations, those that are shown.
Choice = Callable[[Sequence[int], Sequence[Example]], Sequence[Example]]

# Rows that are encoded at once: a bar moves between them.
ENCODED = 256


def drawn_prompts(
    task: Task, config: FitConfig, rng: np.random.Generator, n_prompts: int
) -> Iterator[Prompt]:
    """Yields the first `n_prompts` extraction prompts of a task, drawn by `rng` (section 2)."""
    # Beside `rng`, whose draws are thus those of the prompts whose answers and rows stay.
    answers_rng, demos_rng = rng.spawn(2)
    choose = _choice(task, config, demos_rng)
    episodes = shared_episodes(
        task, n_prompts, config.demos_per_class, rng, config.queries_per_context
    )
    for sharing, balanced in episodes:
        demos = choose(sharing, balanced)
        answers = [task.answer(demo) for demo in demos]
        if config.extract_from == "shuffled":
            answers = shuffled_answers(task, demos, answers_rng)
        turns = []
        for demo, answer in zip(demos, answers, strict=True):
            turns.append((task.question(demo), answer))
        for place in sharing:
            query = task.train[place]
            is_alone = config.extract_from == "zero-shot"
            yield zero_shot(task, query) if is_alone else behind(task, query, turns)


def _choice(task: Task, config: FitConfig, rng: np.random.Generator) -> Choice:
    """Returns what chooses demonstrations, as many as there are balanced ones."""
    if config.demo_selection == "random":
        return lambda sharing, balanced: random_demos(task, len(balanced), rng, sharing)
    encoder = demo_encoder(config)
    if encoder is not None:
        vectors = _vectors(task, encoder)
        # Each query has its own.
        return lambda sharing, balanced: nearest_demos(task, len(balanced), vectors, sharing[0])
    return lambda sharing, balanced: balanced


def random_demos(
    task: Task, n_demos: int, rng: np.random.Generator, exclude: Sequence[int]
) -> list[Example]:
    """Returns training rows drawn from all but those at the places to `exclude`."""
    others = np.setdiff1d(np.arange(len(task.train)), exclude)
    return [task.train[place] for place in rng.choice(others, n_demos, replace=False)]


def nearest_demos(
    task: Task, n_demos: int, vectors: Float[Tensor, "n_rows n_features"], query: int
) -> list[Example]:
    """Returns the training rows most like the one at the place `query`, the most like it last.

    By the cosine of `vectors`, which are of one length.
    """
    similarities = vectors @ vectors[query]
    similarities[query] = -torch.inf
    # Stable, so that of equals the first count.
    places = similarities.argsort(descending=True, stable=True)[:n_demos]
    return [task.train[place] for place in places.flip(0).tolist()]


def demo_encoder(config: FitConfig) -> SentenceEncoder | None:
    """Returns the encoder that finds demonstrations; None where none is asked."""
    name = sentence_encoder(config.encoder)
    if config.demo_selection != "nearest" or name is None:
        return None
    return load_encoder(name, "cpu")


def _vectors(task: Task, encoder: SentenceEncoder) -> Float[Tensor, "n_rows n_features"]:
    """Returns the vectors of all training rows' questions."""
    starts = range(0, len(task.train), ENCODED)
    blocks = [task.train[start : start + ENCODED] for start in starts]
    sizes = [len(block) for block in blocks]
    vectors = []
    for block in track(blocks, f"nearest rows of {task.name}", sizes, "rows"):
        vectors.append(encoder([task.question(row) for row in block]))
    return torch.cat(vectors)


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
