"""Cartridges (Eyuboglu et al. 2025): demonstrations as keys and values, then trained further."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from icrouting.decoder.batches import pad
from icrouting.decoder.passes import next_token_logits
from icrouting.methods.adapters import load_peft
from icrouting.methods.descent import descend, in_batches
from icrouting.methods.distilling import Lessons, mimicry, teacher_log_probs
from icrouting.methods.soft_prompts import PrefixTuning
from icrouting.methods.tuning import BATCH_SIZE
from icrouting.methods.virtual_tokens import in_front
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Example, Task


class Cartridge(PrefixTuning):
    """The keys and values of demonstrations stand before every prompt, and are trained to teach.

    They start as those of a real few-shot prompt, so that before any step the model answers as
    behind its demonstrations; where a tokenizer puts a token before every text, that one stands
    between the two. They are then trained on the Kullback-Leibler divergence from what the model
    says behind these demonstrations to what it says behind the cartridge, on training rows whose
    labels are not read. Differs: the published ones are of long documents, and are taught by
    questions that a model makes up; these are of demonstrations, as many a class as a few-shot
    prompt has (of several sources, `--demos-per-source` each), and are no shorter than them.
    """

    name = "cartridge"
    grid = tuple({"lr": lr} for lr in (1e-3, 1e-2, 1e-4))

    def learn(self, rng: np.random.Generator) -> None:
        """Trains the keys and values of demonstrations to answer as these do."""
        load_peft()
        demos = self._demonstrations(rng)
        pairs = self._taught_rows(rng, demos)
        prompts = [few_shot(task, row, demos) for task, row in pairs]
        # All have one context.
        context = prompts[0].context
        self.context_tokens = self.decoder.tokenize([context])[0]
        lessons = Lessons(
            token_lists=self.decoder.tokenize([task.prompt(row) for task, row in pairs]),
            labels=[0] * len(pairs),
            teacher=teacher_log_probs(self.decoder, [prompt.text for prompt in prompts], 1),
        )
        seed = int(rng.integers(2**31))
        self.choose(self.grid, partial(self._taught, lessons, seed))
        self.n_labelled = len(demos) + self.n_validation
        self.n_trained = self.soft_prompt.numel()

    def _demonstrations(self, rng: np.random.Generator) -> list[tuple[Task, Example]]:
        """Returns the demonstrations that the cartridge starts as."""
        pairs = []
        for task in self.sources:
            demos = balanced_demos(task, self.settings.demos_per_class, rng)
            if len(self.sources) > 1:
                demos = demos[: self.settings.demos_per_source]
            pairs += [(task, demo) for demo in demos]
        return pairs

    def _taught_rows(
        self, rng: np.random.Generator, demos: Sequence[tuple[Task, Example]]
    ) -> list[tuple[Task, Example]]:
        """Returns training rows that are no demonstrations; where there are none, these."""
        shown = {id(demo) for _, demo in demos}
        pairs = []
        for task in self.sources:
            picked = rng.permutation(len(task.train))[: self.settings.train_rows]
            rows = [task.train[place] for place in picked]
            pairs += [(task, row) for row in rows if id(row) not in shown]
        return pairs or list(demos)

    def _taught(self, lessons: Lessons, seed: int, lr: float) -> dict[str, Tensor]:
        """Returns a trained cartridge; `seed` is that of the rows' order."""
        decoder = self.decoder
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            start = self.start(self.context_tokens)

        def loss_of(rows: Sequence[int]) -> Tensor:
            token_lists = [lessons.token_lists[row] for row in rows]
            batch = pad(token_lists, decoder.pad_id).to(decoder.device)
            return mimicry(next_token_logits(decoder.base, batch), lessons, rows)

        with in_front(decoder.base, self.kind, start) as prompt:
            optimizer = torch.optim.AdamW([prompt], lr=lr, weight_decay=0.0)
            n_epochs = self.settings.train_epochs
            for _ in track(range(n_epochs), "distilling", [1] * n_epochs, "epochs"):
                order = rng.permutation(len(lessons.labels)).tolist()
                descend(optimizer, in_batches(order, BATCH_SIZE), loss_of)
            # A copy, since on the CPU peft's parameter itself would be kept.
            trained = prompt.detach().cpu().clone()
        return {"soft_prompt": trained}
