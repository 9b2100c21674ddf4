"""Distilling few-shot prompting into vectors: what LIVE and M2IV share."""

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
from icrouting.decoder.hold import frozen
from icrouting.decoder.passes import TOKEN_BUDGET, next_token_logits
from icrouting.methods.base import Context, Method
from icrouting.methods.descent import descend, in_batches
from icrouting.methods.tuning import answer_partings, answered
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Example, Task

FIRST_STD = 0.01
FIRST_STRENGTH = 0.1
STRENGTH_LR = 1e-2
WEIGHT_DECAY = 1e-3
WARM_UP = 0.1
CLIP = 1.0
BATCH_SIZE = 16
W_LABEL = 0.5
# Draws of demonstrations for every training row.
N_DRAWS = 2

# A place is where a vector works: a layer for LIVE, a branch of one for M2IV.
Vectors = Float[Tensor, "n_places hidden_size"]
Strengths = Float[Tensor, "n_places"]
Edits = Callable[[Vectors, Strengths], Context]


@dataclass(frozen=True)
class Lessons:
    """What a student is taught, by training row.

    Attributes:
        token_lists: the zero-shot prompts.
        labels: the tokens that the right answers begin or go on with, see `answered`.
        teacher: log-probabilities of the next token behind demonstrations, [vocab] each, in float16
            and off the accelerator: 100 MB for 1000 rows and a vocabulary of 50,000.
    """

    token_lists: list[list[int]]
    labels: list[int]
    teacher: list[Tensor]


class Distilled(Method, ABC):
    """Vectors with a strength each, that a subclass puts to work by `_edited`."""

    learned = ("vectors", "strengths", "losses")
    cached = ("vectors", "strengths")
    vectors: Vectors
    strengths: Strengths

    @abstractmethod
    def _edited(self, vectors: Vectors, strengths: Strengths) -> Context:
        """Inside, the model runs under these vectors."""

    def applied(self, task: Task) -> Context:
        """Edits the model by what was learned."""
        device = self.decoder.device
        return self._edited(self.vectors.to(device), self.strengths.to(device))

    def _count(self, lessons: Lessons) -> None:
        n_rows = [min(len(task.train), self.settings.train_rows) for task in self.sources]
        self.n_labelled = sum(n_rows) + self.n_validation
        self.n_trained = self.vectors.numel() + self.strengths.numel()


def lessons_of(method: Method, rng: np.random.Generator) -> Lessons:
    """Returns the lessons of `train_rows` rows per source; ValueError for none."""
    pairs: list[tuple[Task, Example]] = []
    few_shot_texts: list[str] = []
    for source in method.sources:
        picked = rng.permutation(len(source.train))[: method.settings.train_rows]
        # Demonstrations come from these rows too, or the teacher would see more than the student.
        task = replace(source, train=tuple(source.train[i] for i in picked))
        pairs += [(task, example) for example in task.train]
        few_shot_texts += _few_shot_texts(task, method.settings.demos_per_class, rng)
    if not pairs:
        raise ValueError(
            f"{method.name} learns from training rows: give at least one source task that has some"
        )
    rows = answered(method.decoder, pairs)
    texts: list[str] = []
    beginnings: list[list[int]] = []
    # The teacher reads as much of an answer as the student does.
    for row, places in enumerate(answer_partings(method.decoder, pairs)):
        for parting in places:
            texts += few_shot_texts[N_DRAWS * row : N_DRAWS * (row + 1)]
            beginnings += [parting.beginning] * N_DRAWS
    return Lessons(
        token_lists=[tokens for tokens, _ in rows],
        labels=[label for _, label in rows],
        teacher=teacher_log_probs(method.decoder, texts, N_DRAWS, beginnings),
    )


def _few_shot_texts(task: Task, per_class: int, rng: np.random.Generator) -> list[str]:
    """Returns what the teacher reads: every training row, `N_DRAWS` times in turn."""
    texts = []
    for i, example in enumerate(task.train):
        for _ in range(N_DRAWS):
            # A row that is shown with its answer would teach nothing about itself.
            demos = balanced_demos(task, per_class, rng, exclude=[i])
            pairs = [(task, demo) for demo in demos]
            texts.append(few_shot(task, example, pairs).text)
    return texts


@torch.no_grad()
def teacher_log_probs(
    decoder: Decoder,
    texts: Sequence[str],
    n_draws: int,
    beginnings: Sequence[Sequence[int]] | None = None,
) -> list[Tensor]:
    """Returns log-probabilities of the next token, [vocab] each, in float16.

    Each is the log of a mean over `n_draws` texts that stand side by side; `beginnings` are tokens
    of answers that follow the texts. Differs: LIVE draws
    demonstrations anew in every epoch. The mean over draws of KL(teacher || student) has the
    gradient of the KL from the mean teacher, so that one is kept: the same descent, less noise, and
    one pass.
    """
    token_lists = decoder.tokenize(texts)
    if beginnings is not None:
        token_lists = [[*pair[0], *pair[1]] for pair in zip(token_lists, beginnings, strict=True)]
    groups = list(by_length(token_lists, decoder.token_budget or TOKEN_BUDGET))
    sizes = [len(group) for group in groups]
    # The log of nought, to which probabilities are added.
    mean_log_probs = [torch.tensor(-torch.inf)] * (len(texts) // n_draws)
    for group in track(groups, "teacher", sizes, "prompts"):
        batch = pad([token_lists[i] for i in group], decoder.pad_id)
        logits = next_token_logits(decoder.model, batch.to(decoder.device))
        log_probs = logits.log_softmax(-1).cpu()
        shares = log_probs - math.log(n_draws)
        # The draws of one row may come in different groups, so its mean grows draw by draw.
        for i, share in zip(group, shares, strict=True):
            row = i // n_draws
            mean_so_far = mean_log_probs[row].float()
            mean_log_probs[row] = torch.logaddexp(mean_so_far, share).half()
    return mean_log_probs


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
    """Returns trained "vectors" and "strengths", and the "losses" on the way.

    Loss = KL(teacher || student) + 0.5 * cross-entropy of the label + `extra`, where the student
    reads the zero-shot prompt under `edits`; all at the prompt's last token, whose logits predict
    the label, over the vocabulary. Differs: LIVE's code takes the KL from the answer's first token
    on, one position later, and the cross-entropy over the question too; and it visits rows in one
    order, where these are shuffled.

    Args:
        method: The method that learns, on its decoder.
        lessons: What the student is taught.
        n_places: How many vectors there are, each with a strength.
        edits: Returns the context in which the model runs under vectors and strengths.
        lr: The highest learning rate of the vectors; that of the strengths is 0.01.
        epochs: Passes over the lessons.
        seed: Of the vectors' start and the order of the lessons.
        extra: Returns what a batch adds to the loss, once the model has read it.
    """
    decoder = method.decoder
    vectors, strengths = _start(decoder, n_places, seed)
    steps = _steps(len(lessons.labels), epochs, seed)
    # A strength is one number for a whole vector, and moves at a rate of its own.
    groups = [
        {"params": [vectors], "lr": lr},
        {"params": [strengths], "lr": STRENGTH_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    n_warm_up = round(WARM_UP * len(steps))
    schedule = get_cosine_schedule_with_warmup(optimizer, n_warm_up, len(steps))

    def loss_of(rows: Sequence[int]) -> Tensor:
        token_lists = [lessons.token_lists[row] for row in rows]
        batch = pad(token_lists, decoder.pad_id).to(decoder.device)
        loss = lesson_loss(next_token_logits(decoder.model, batch), lessons, rows)
        if extra is not None:
            loss = loss + extra(batch)
        return loss

    tracked = track(steps, method.name, [len(rows) for rows in steps], "rows")
    with frozen(decoder.model), edits(vectors, strengths):
        losses = descend(optimizer, tracked, loss_of, schedule, CLIP)
    return {
        "vectors": vectors.detach().cpu(),
        "strengths": strengths.detach().cpu(),
        "losses": torch.stack(losses).cpu(),
    }


def _start(decoder: Decoder, n_places: int, seed: int) -> tuple[Vectors, Strengths]:
    """Returns untrained vectors and strengths."""
    # Drawn on the CPU, so that every device starts from the same vectors.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_places, decoder.hidden_size, generator=generator)
    vectors = (drawn * FIRST_STD).to(decoder.device).requires_grad_()
    strengths = torch.full((n_places,), FIRST_STRENGTH, device=decoder.device)
    return vectors, strengths.requires_grad_()


def _steps(n_rows: int, epochs: int, seed: int) -> list[Sequence[int]]:
    """Returns the rows of every step, shuffled anew for every epoch."""
    rng = np.random.default_rng(seed)
    steps: list[Sequence[int]] = []
    for _ in range(epochs):
        order = rng.permutation(n_rows).tolist()
        steps += in_batches(order, BATCH_SIZE)
    return steps


def lesson_loss(
    logits: Float[Tensor, "batch vocab"], lessons: Lessons, rows: Sequence[int]
) -> Float[Tensor, ""]:
    """Returns KL(teacher || student) + 0.5 * cross-entropy of the label, in nats.

    It is the mean over rows.

    Args:
        logits: The student's, behind the zero-shot prompts of the rows.
        lessons: What the student is taught.
        rows: Which of the lessons these are.
    """
    labels = torch.tensor([lessons.labels[row] for row in rows], device=logits.device)
    label_loss = nn.functional.cross_entropy(logits, labels)
    return mimicry(logits, lessons, rows) + W_LABEL * label_loss


def mimicry(
    logits: Float[Tensor, "batch vocab"], lessons: Lessons, rows: Sequence[int]
) -> Float[Tensor, ""]:
    """Returns KL(teacher || student), the mean over rows, in nats; arguments as `lesson_loss`."""
    kept_log_probs = torch.stack([lessons.teacher[row] for row in rows])
    # Rounded to float16, the kept probabilities no longer sum to one.
    teacher = kept_log_probs.to(logits.device).float().log_softmax(-1)
    student = logits.log_softmax(-1)
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
