"""Distilling few-shot prompting into vectors: what LIVE and M2IV share, which differ in what their vectors do."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from icrouting.decoder.batches import Batch, by_length, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, stack_of
from icrouting.decoder.hold import frozen
from icrouting.decoder.passes import TOKEN_BUDGET, next_token_logits
from icrouting.methods.base import Context, Method
from icrouting.methods.tuning import answered
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Task

FIRST_STD, FIRST_STRENGTH = 0.01, 0.1
STRENGTH_LR, WEIGHT_DECAY, WARM_UP, CLIP, BATCH_SIZE, W_LABEL = 1e-2, 1e-3, 0.1, 1.0, 16, 0.5
N_DRAWS = 2
Edits = Callable[[Float[Tensor, "n_places hidden_size"], Float[Tensor, "n_places"]], Context]


@dataclass(frozen=True)
class Lessons:
    """What a student is taught, by training row: zero-shot prompt, token that the right answer begins with, teacher.

    `teacher` holds log-probabilities of the next token behind demonstrations, [vocab] each, in float16 and off the
    accelerator: 100 MB for 1000 rows and a vocabulary of 50,000.
    """

    token_lists: list[list[int]]
    labels: list[int]
    teacher: list[Tensor]


class Distilled(Method, ABC):
    """What LIVE and M2IV share: vectors with a strength each, that a subclass puts to work by `_edited`."""

    learned = ("vectors", "strengths", "losses")
    cached = ("vectors", "strengths")
    vectors: Float[Tensor, "n_places hidden_size"]
    strengths: Float[Tensor, "n_places"]

    @abstractmethod
    def _edited(
        self, vectors: Float[Tensor, "n_places hidden_size"], strengths: Float[Tensor, "n_places"]
    ) -> Context:
        """Inside, the model runs under these vectors."""

    def applied(self, task: Task) -> Context:
        """Edits the model by what was learned."""
        device = self.decoder.device
        return self._edited(self.vectors.to(device), self.strengths.to(device))

    def _count(self, lessons: Lessons) -> None:
        self.n_labelled = len(lessons.labels) + self.n_validation
        self.n_trained = self.vectors.numel() + self.strengths.numel()


def lessons_of(method: Method, rng: np.random.Generator) -> Lessons:
    """Returns the lessons of `train_rows` rows per source; demonstrations are drawn among the same rows."""
    decoder, settings = method.decoder, method.settings
    pairs, shown = [], []
    for task in method.sources:
        rows = [task.train[i] for i in rng.permutation(len(task.train))[: settings.train_rows]]
        task = replace(task, train=tuple(rows))
        pairs += [(task, row) for row in rows]
        for i in np.repeat(range(len(rows)), N_DRAWS).tolist():
            demos = balanced_demos(task, settings.demos_per_class, rng, exclude=[i])
            shown.append(few_shot(task, rows[i], [(task, demo) for demo in demos]).text)
    if not pairs:
        raise ValueError(
            f"{method.name} learns from training rows: give at least one source task that has some"
        )
    token_lists, labels = map(list, zip(*answered(decoder, pairs), strict=True))
    return Lessons(token_lists, labels, teacher_log_probs(decoder, shown, N_DRAWS))


@torch.no_grad()
def teacher_log_probs(decoder: Decoder, texts: Sequence[str], n_draws: int) -> list[Tensor]:
    """Returns the log of the next token's probability, a mean over every `n_draws` texts in turn, in float16.

    Differs: LIVE draws demonstrations anew in every epoch. The mean over draws of KL(teacher || student) has the
    gradient of the KL from the mean teacher, so that one is kept: the same descent, less noise, and one pass.
    """
    token_lists = decoder.tokenize(texts)
    groups = list(by_length(token_lists, TOKEN_BUDGET))
    found = [torch.tensor(-torch.inf)] * (len(texts) // n_draws)
    for group in track(groups, "teacher", list(map(len, groups)), "prompts"):
        batch = pad([token_lists[i] for i in group], decoder.pad_id).to(decoder.device)
        log_probs = next_token_logits(decoder.model, batch).log_softmax(-1).cpu() - math.log(
            n_draws
        )
        for i, own in zip(group, log_probs, strict=True):
            found[i // n_draws] = torch.logaddexp(found[i // n_draws].float(), own).half()
    return found


def distilled(
    method: Method,
    lessons: Lessons,
    n_places: int,
    edits: Edits,
    *,
    lr: float,
    epochs: int,
    seed: int,
    extra: Callable[[Batch], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Returns "vectors" [n_places, hidden_size], "strengths" [n_places] and the "losses" of their training.

    Loss = KL(teacher || student) + 0.5 * cross-entropy of the label + `extra`, where the student reads the
    zero-shot prompt under `edits`; all at the prompt's last token, whose logits predict the label, over the
    vocabulary. Differs: LIVE's code takes the KL from the answer's first token on, one position later, and the
    cross-entropy over the question too; and it visits rows in one order, where these are shuffled.
    """
    model, generator, rng = (
        method.model,
        torch.Generator().manual_seed(seed),
        np.random.default_rng(seed),
    )
    drawn = torch.randn(n_places, stack_of(model).config.hidden_size, generator=generator)
    vectors = (drawn * FIRST_STD).to(device_of(model)).requires_grad_()
    strengths = torch.full((n_places,), FIRST_STRENGTH, device=device_of(model), requires_grad=True)
    orders = [rng.permutation(len(lessons.labels)).tolist() for _ in range(epochs)]
    steps = [
        order[at : at + BATCH_SIZE] for order in orders for at in range(0, len(order), BATCH_SIZE)
    ]
    groups = [{"params": [vectors], "lr": lr}, {"params": [strengths], "lr": STRENGTH_LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * len(steps)), len(steps))
    losses = []
    with frozen(model), edits(vectors, strengths), torch.enable_grad():
        for rows in track(steps, method.name, list(map(len, steps)), "rows"):
            batch = pad([lessons.token_lists[row] for row in rows], method.decoder.pad_id).to(
                device_of(model)
            )
            loss = lesson_loss(next_token_logits(model, batch), lessons, rows) + (
                extra(batch) if extra else 0.0
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([vectors, strengths], CLIP)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    trained = {"vectors": vectors.detach().cpu(), "strengths": strengths.detach().cpu()}
    return {**trained, "losses": torch.tensor(losses)}


def lesson_loss(
    logits: Float[Tensor, "batch vocab"], lessons: Lessons, rows: list[int]
) -> Float[Tensor, ""]:
    """Returns KL(teacher || student) + 0.5 * cross-entropy of the label, the mean over rows, in nats."""
    teacher = (
        torch.stack([lessons.teacher[row] for row in rows])
        .to(logits.device)
        .float()
        .log_softmax(-1)
    )
    mimicry = nn.functional.kl_div(
        logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True
    )
    targets = torch.tensor([lessons.labels[row] for row in rows], device=logits.device)
    return mimicry + W_LABEL * nn.functional.cross_entropy(logits, targets)
