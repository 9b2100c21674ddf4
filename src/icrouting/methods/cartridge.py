"""Cartridges (Eyuboglu et al. 2025): a prefix that starts as demonstrations and is distilled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.labels import Parting, partings
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import counted_tokens
from icrouting.methods.adapters import load_peft
from icrouting.methods.descent import descend, in_batches
from icrouting.methods.distilling import N_DRAWS, teacher_log_probs
from icrouting.methods.soft_prompts import PrefixTuning
from icrouting.methods.tuning import BATCH_SIZE, WARM_UP
from icrouting.methods.virtual_tokens import in_front
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, demonstration, few_shot
from icrouting.tasks.task import Example, Task

# Demonstrations that the prefix holds, where the teacher reads `demos_per_class`.
PER_CLASS = 1

Pairs = Sequence[tuple[Task, Example]]


@dataclass(frozen=True)
class Lesson:
    """What the teacher makes of one place at which a row's options part.

    Attributes:
        tokens: the zero-shot prompt, and what the options begin with before they part.
        following: the tokens with which options go on from there.
        teacher: their log-probabilities behind demonstrations, of these tokens alone.
        weight: how likely the teacher is to come to this place: 1 where all options part.
    """

    tokens: list[int]
    following: list[int]
    teacher: Float[Tensor, "n_following"]
    weight: float


class Cartridge(PrefixTuning):
    """Keys and values of real demonstrations stand before every prompt, distilled from more.

    The prefix starts as the cache of one demonstration a class, shuffled (over several tasks, of
    each of them), so that before any step the model reads a few-shot prompt. It is trained towards
    what the frozen model says behind `Settings.demos_per_class` demonstrations a class, a mean over
    two draws: KL(teacher || prefix) over the options, on training rows that the prefix does not
    show, whose own labels nothing reads. The learning rate is chosen on validation rows; one of
    the settings is the demonstrations as they are. As published, the first token is not trained.
    Differs: rows of the task in place of conversations that the model makes up about a corpus.
    Where a tokenizer begins texts with a token of its own, as Llama's does, it stands before the
    prompt too, and a chat's demonstrations are conversations of their own.
    """

    name = "cartridge"
    learned = ("soft_prompt", "losses")
    grid = tuple({"lr": lr} for lr in (1e-2, 1e-3, 0.0, 3e-2))
    losses: Float[Tensor, "n_steps"]

    def learn(self, rng: np.random.Generator) -> None:
        """Draws the demonstrations, runs the teacher once, and trains and chooses the prefix."""
        load_peft()
        demos: list[tuple[Task, Example]] = []
        lessons: list[Lesson] = []
        n_rows = 0
        for source in self.sources:
            picked = rng.permutation(len(source.train))[: self.settings.train_rows]
            # Demonstrations come from these rows too, or the teacher would see more of them.
            task = replace(source, train=tuple(source.train[i] for i in picked))
            task_demos = balanced_demos(task, PER_CLASS, rng)
            demos += [(task, demo) for demo in task_demos]
            lessons += self._lessons(task, task_demos, rng)
            n_rows += len(task.train)
        shuffled = [demos[place] for place in rng.permutation(len(demos))]
        with torch.no_grad():
            start = self.start(demonstration_tokens(self.decoder, shuffled))
        seed = int(rng.integers(2**31))
        self.choose(self.grid, partial(self._distilled, start, lessons, seed))
        self.n_labelled = n_rows + self.n_validation
        self.n_trained = self.soft_prompt[1:].numel()

    def _lessons(
        self, task: Task, shown: Sequence[Example], rng: np.random.Generator
    ) -> list[Lesson]:
        """Returns the lessons of the rows that the prefix does not show, if any is left."""
        # By identity, since two rows may read alike.
        shown_ids = {id(row) for row in shown}
        places = [i for i, row in enumerate(task.train) if id(row) not in shown_ids]
        rows = places or list(range(len(task.train)))
        partings_by_row = [option_partings(self.decoder, task, task.train[i]) for i in rows]
        texts: list[str] = []
        beginnings: list[list[int]] = []
        for i, row_partings in zip(rows, partings_by_row, strict=True):
            row_texts = self._few_shot_texts(task, i, rng)
            for parting in row_partings:
                texts += row_texts
                beginnings += [parting.beginning] * N_DRAWS
        log_probs = iter(teacher_log_probs(self.decoder, texts, N_DRAWS, beginnings))
        token_lists = self.decoder.tokenize([task.prompt(task.train[i]) for i in rows])
        lessons = []
        for tokens, row_partings in zip(token_lists, partings_by_row, strict=True):
            teachers = []
            for parting in row_partings:
                teachers.append(next(log_probs)[parting.following].float().log_softmax(0))
            weights = reached(row_partings, teachers)
            for parting, teacher, weight in zip(row_partings, teachers, weights, strict=True):
                prompt = [*tokens, *parting.beginning]
                lessons.append(Lesson(prompt, parting.following, teacher, weight))
        return lessons

    def _few_shot_texts(self, task: Task, row: int, rng: np.random.Generator) -> list[str]:
        """Returns what the teacher reads of a training row, one text a draw."""
        texts = []
        for _ in range(N_DRAWS):
            # A row that is shown with its answer would give its label away.
            demos = balanced_demos(task, self.settings.demos_per_class, rng, exclude=[row])
            pairs = [(task, demo) for demo in demos]
            texts.append(few_shot(task, task.train[row], pairs).text)
        return texts

    def _distilled(
        self,
        start: Float[Tensor, "n_virtual width"],
        lessons: Sequence[Lesson],
        seed: int,
        lr: float,
    ) -> dict[str, Tensor]:
        """Returns the prefix and the losses on the way; at a rate of 0 it is the start."""
        decoder = self.decoder
        if not lr:
            return {"soft_prompt": start, "losses": torch.zeros(0)}
        rng = np.random.default_rng(seed)
        batches: list[Sequence[int]] = []
        for _ in range(self.settings.train_epochs):
            batches += in_batches(rng.permutation(len(lessons)).tolist(), BATCH_SIZE)

        def loss_of(rows: Sequence[int]) -> Tensor:
            return lesson_loss(decoder, [lessons[row] for row in rows])

        steps = track(batches, self.name, [len(rows) for rows in batches], "rows")
        with in_front(decoder.base, self.kind, start) as prefix:
            # All attend to the first token, whatever it is, and a change of it upsets everything.
            prefix.register_hook(_without_first)
            optimizer = torch.optim.AdamW([prefix], lr=lr, weight_decay=0.0)
            n_warm_up = max(1, round(WARM_UP * len(batches)))
            schedule = get_linear_schedule_with_warmup(optimizer, n_warm_up, len(batches))
            losses = descend(optimizer, steps, loss_of, schedule)
            # A copy, since on the CPU peft's parameter itself would be kept.
            trained = prefix.detach().cpu().clone()
        return {"soft_prompt": trained, "losses": torch.stack(losses).cpu()}


def demonstration_tokens(decoder: Decoder, demos: Pairs) -> list[int]:
    """Returns the tokens of demonstrations, as they stand in a few-shot prompt's context."""
    text = "".join(demonstration(task, demo) for task, demo in demos)
    (tokens,) = decoder.tokenize([text])
    return tokens


def option_partings(decoder: Decoder, task: Task, row: Example) -> list[Parting]:
    """Returns all places at which a row's options part, each once, the shortest beginning first."""
    labels = counted_tokens(
        decoder.tokenizer,
        task.prompt(row),
        task.options(row),
        task.spec.label_scoring,
        task.joint,
    )
    by_beginning: dict[tuple[int, ...], Parting] = {}
    for place in range(len(labels)):
        for parting in partings(labels, place):
            by_beginning.setdefault(tuple(parting.beginning), parting)
    return sorted(by_beginning.values(), key=lambda parting: len(parting.beginning))


def reached(
    row_partings: Sequence[Parting], teachers: Sequence[Float[Tensor, "n_following"]]
) -> list[float]:
    """Returns how likely the teacher comes to each place at which options part.

    With these weights the places' KL sum to that over whole options, by the chain rule. Places
    stand as in `option_partings`, and the teacher's log-probabilities are of what follows there.
    """
    weights: list[float] = []
    for place, parting in enumerate(row_partings):
        weight = 1.0
        # The latest that this one's beginning goes on from is its parent.
        for earlier in reversed(range(place)):
            before = row_partings[earlier]
            n_before = len(before.beginning)
            beginning = parting.beginning
            if len(beginning) > n_before and beginning[:n_before] == before.beginning:
                way = before.following.index(beginning[n_before])
                weight = weights[earlier] * float(teachers[earlier][way].exp())
                break
        weights.append(weight)
    return weights


def lesson_loss(decoder: Decoder, lessons: Sequence[Lesson]) -> Float[Tensor, ""]:
    """Returns KL(teacher || model) over the options in nats, weighted, the mean over lessons."""
    batch = pad([lesson.tokens for lesson in lessons], decoder.pad_id).to(decoder.device)
    losses = []
    for logits, lesson in zip(next_token_logits(decoder.base, batch), lessons, strict=True):
        student = logits[lesson.following].log_softmax(0)
        teacher = lesson.teacher.to(student.device)
        losses.append(lesson.weight * (teacher.exp() * (teacher - student)).sum())
    return torch.stack(losses).mean()


def _without_first(gradient: Float[Tensor, "n_virtual width"]) -> Tensor:
    """Returns a prefix's gradient, without that of its first token."""
    masked = gradient.clone()
    masked[0] = 0.0
    return masked
