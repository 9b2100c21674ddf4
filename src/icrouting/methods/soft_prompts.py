"""Soft prompts: trained embeddings (Lester et al. 2021) or keys and values (Li & Liang 2021) before every prompt."""

import string
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from icrouting.decoder.batches import pad
from icrouting.decoder.families import CACHE, device_of
from icrouting.decoder.passes import next_token_logits
from icrouting.methods.adapters import in_front, load_peft
from icrouting.methods.base import Context, Method
from icrouting.methods.settings import Settings
from icrouting.methods.tuning import answered, tune
from icrouting.tasks.task import Task

PUBLISHED_EPOCHS = 50


class PromptTuning(Method):
    """Trained embeddings stand before every prompt, whose positions start behind them.

    They start as the embeddings of the task's template. Differs: the rows and epochs of other trained methods
    instead of demonstrations and 50 epochs; and the answer is read at the prompt's last token, where the
    comparison of Li et al. 2024, whose one token and learning rate come first, reads one token before it.
    """

    name = "prompt-tuning"
    learned = ("soft_prompt",)
    cached = ("soft_prompt",)
    grid = tuple({"n_virtual": n, "lr": lr} for n in (1, 8, 20) for lr in (0.1, 0.01, 0.3))
    kind = "PromptTuningConfig"
    soft_prompt: Float[Tensor, "n_virtual width"]

    @classmethod
    def cuts(cls, settings: Settings) -> list[str]:
        """Returns a sentence if the training is shorter than the published one."""
        epochs = settings.train_epochs
        if epochs >= PUBLISHED_EPOCHS:
            return []
        return [f"Prompt tuning is trained for {epochs} epochs (published: {PUBLISHED_EPOCHS})."]

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one soft prompt on the pooled rows of all sources."""
        n = self.settings.train_rows
        load_peft()
        pairs = [
            (task, task.train[i])
            for task in self.sources
            for i in rng.permutation(len(task.train))[:n]
        ]
        rows = answered(self.decoder, pairs)
        self.choose(self.grid, partial(self._trained, rows, int(rng.integers(2**31))))
        self.n_labelled, self.n_trained = len(pairs) + self.n_validation, self.soft_prompt.numel()

    def applied(self, task: Task) -> Context:
        """Puts the soft prompt before every prompt."""
        return in_front(self.decoder.model, self.kind, self.soft_prompt)

    def start(self, tokens: Sequence[int]) -> Float[Tensor, "n_virtual width"]:
        """Returns the soft prompt that does what tokens in front of the prompt would do."""
        embed = self.decoder.stack.get_input_embeddings()
        assert embed is not None, "a decoder embeds its tokens"
        return embed(torch.tensor(tokens, device=self.decoder.device)).float()

    def _trained(
        self, rows: Sequence[tuple[list[int], int]], seed: int, n_virtual: int, lr: float
    ) -> dict[str, Tensor]:
        base, rng = self.decoder.model, np.random.default_rng(seed)
        literals = [
            text
            for task in self.sources
            for text, *_ in string.Formatter().parse(task.spec.template)
        ]
        words = self.tokenizer("".join(literals) or "\n", add_special_tokens=False).input_ids
        with torch.no_grad():
            start = self.start([words[i % len(words)] for i in range(n_virtual)])

        def logits_of(token_lists: list[list[int]]) -> Tensor:
            return next_token_logits(
                base, pad(token_lists, self.decoder.pad_id).to(device_of(base))
            )

        with in_front(base, self.kind, start) as prompt:
            tune([prompt], rows, (), logits_of, lr=lr, n_epochs=self.settings.train_epochs, rng=rng)
            return {"soft_prompt": prompt.detach().cpu().clone()}


class PrefixTuning(PromptTuning):
    """Trained keys and values stand before those of every prompt, in every layer; no token is read for them.

    They are not rotated. Differs: without the published reparametrisation by an MLP; they start as the keys and
    values of the task's template, as Li & Liang advise for few rows (section 7.4).
    """

    name = "prefix-tuning"
    grid = tuple({"n_virtual": n, "lr": lr} for n in (8, 16, 1) for lr in (1e-2, 1e-3, 3e-2))
    kind = "PrefixTuningConfig"

    @classmethod
    def cuts(cls, settings: Settings) -> list[str]:
        """Returns nothing: 50 epochs are what was published of soft prompts, not of prefixes."""
        return []

    def start(self, tokens: Sequence[int]) -> Float[Tensor, "n_virtual width"]:
        """Returns the prefix that does what tokens in front of the prompt would do."""
        cache, input_ids = DynamicCache(), torch.tensor([tokens], device=self.decoder.device)
        self.decoder.stack(input_ids=input_ids, use_cache=True, **{CACHE: cache})
        held = [
            getattr(layer, name)[0].float().cpu()
            for layer in cache.layers
            for name in ("keys", "values")
        ]
        return torch.stack(held).permute(2, 0, 1, 3).flatten(1)
