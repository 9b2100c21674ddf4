"""Soft prompts: trained embeddings, or keys and values, stand before every prompt.

Embeddings are those of Lester et al. 2021, keys and values those of Li & Liang 2021.
"""

import string
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from icrouting.decoder.batches import pad
from icrouting.decoder.families import CACHE
from icrouting.decoder.passes import next_token_logits
from icrouting.methods.adapters import load_peft
from icrouting.methods.base import Context, Method
from icrouting.methods.settings import Settings
from icrouting.methods.tuning import AnsweredRow, answered, tune
from icrouting.methods.virtual_tokens import in_front
from icrouting.runtime.pages import counted
from icrouting.tasks.task import Example, Task

PUBLISHED_EPOCHS = 50


class PromptTuning(Method):
    """Trained embeddings stand before every prompt, whose positions start behind them.

    They start as the embeddings of the task's template. Differs: the rows and epochs of other
    trained methods instead of demonstrations and 50 epochs; and the answer is read at the prompt's
    last token, where the comparison of Li et al. 2024, whose one token and learning rate come
    first, reads one token before it.
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
        taken = counted(epochs, "epoch")
        return [f"Prompt tuning is trained for {taken} (published: {PUBLISHED_EPOCHS})."]

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one soft prompt on the pooled rows of all sources."""
        # Where peft is missing, that is said before anything is run.
        load_peft()
        pairs: list[tuple[Task, Example]] = []
        for task in self.sources:
            picked = rng.permutation(len(task.train))[: self.settings.train_rows]
            pairs += [(task, task.train[i]) for i in picked]
        rows = answered(self.decoder, pairs)
        # One seed for all settings, so that they differ in nothing else.
        seed = int(rng.integers(2**31))
        self.choose(self.grid, partial(self._trained, rows, seed))
        self.n_labelled = len(pairs) + self.n_validation
        self.n_trained = self.soft_prompt.numel()

    def applied(self, task: Task) -> Context:
        """Puts the soft prompt before every prompt."""
        return in_front(self.decoder.base, self.kind, self.soft_prompt)

    def start(self, tokens: Sequence[int]) -> Float[Tensor, "n_virtual width"]:
        """Returns the soft prompt that does what tokens in front of the prompt would do."""
        embed = self.decoder.stack.get_input_embeddings()
        assert embed is not None, "a decoder embeds its tokens"
        input_ids = torch.tensor(tokens, device=self.decoder.device)
        return embed(input_ids).float()

    def _trained(
        self, rows: Sequence[AnsweredRow[list[int]]], seed: int, n_virtual: int, lr: float
    ) -> dict[str, Tensor]:
        """Returns a trained soft prompt; `seed` is that of the rows' order."""
        decoder = self.decoder
        with torch.no_grad():
            start = self.start(self._template_tokens(n_virtual))

        def logits_of(token_lists: list[list[int]]) -> Tensor:
            batch = pad(token_lists, decoder.pad_id).to(decoder.device)
            return next_token_logits(decoder.base, batch)

        with in_front(decoder.base, self.kind, start) as prompt:
            tune(
                [prompt],
                rows,
                (),
                logits_of,
                lr=lr,
                n_epochs=self.settings.train_epochs,
                rng=np.random.default_rng(seed),
            )
            # A copy, since on the CPU peft's parameter itself would be kept.
            trained = prompt.detach().cpu().clone()
        return {"soft_prompt": trained}

    def _template_tokens(self, n_tokens: int) -> list[int]:
        """Returns tokens of the sources' templates, over and over."""
        literals = []
        for task in self.sources:
            for literal, *_ in string.Formatter().parse(task.spec.template):
                literals.append(literal)
        # A template may hold fields alone, and a soft prompt has to start as something.
        text = "".join(literals) or "\n"
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        return [tokens[i % len(tokens)] for i in range(n_tokens)]


class PrefixTuning(PromptTuning):
    """Trained keys and values stand before those of every prompt, in every layer.

    No token is read for them, and they are not rotated. Differs: without the published
    reparametrisation by an MLP; they start as the keys and values of the task's template, as
    Li & Liang advise for few rows (section 7.4).
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
        cache = DynamicCache()
        input_ids = torch.tensor([tokens], device=self.decoder.device)
        self.decoder.stack(input_ids=input_ids, use_cache=True, **{CACHE: cache})
        # In general a layer may hold something else than keys and values; these hold both.
        layers: Any = cache.layers
        keys_and_values = []
        for layer in layers:
            for states in (layer.keys, layer.values):
                # [n_kv_heads, n_virtual, head_dim], off the devices, of which there may be many.
                keys_and_values.append(states[0].float().cpu())
        # A row per token, in peft's order: layer, then key or value, then head.
        by_token = torch.stack(keys_and_values).permute(2, 0, 1, 3)
        return by_token.flatten(1)
