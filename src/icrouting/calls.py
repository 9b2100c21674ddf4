"""Calls: what a decoder, or its `generate`, was given, and which of those tokens answer the prompt."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.batches import attended
from icrouting.families import CACHE, base_of


def called_with(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's call by name."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return given | given.pop("kwargs", {})


def read_by(given: dict[str, Any]) -> Tensor:
    """Returns the token ids, or else the embeddings, among a decoder's arguments."""
    return given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]


def n_seen(given: dict[str, Any]) -> int:
    """Returns the tokens in the cache among the arguments of a decoder or of `generate`."""
    cache = given.get(CACHE, given.get("past_key_values"))
    return 0 if cache is None else int(cache.get_seq_length())


def asked(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the token ids among the arguments of `generate`."""
    given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    return next((value for value in given if isinstance(value, Tensor)), None)


class Answering:
    """Which tokens answer in the forward that runs: `rows` and `positions`, one each; comes from `answering`."""

    rows: Int[Tensor, "n_tokens"]
    positions: Int[Tensor, "n_tokens"]

    def __init__(self, in_steps: bool):
        self._in_steps, self._given, self._asked = in_steps, {}, {}

    def prompts(self) -> list[list[int]]:
        """Returns the tokens of every row's prompt."""
        given = self._asked or self._given
        if (input_ids := given.get("input_ids")) is None:
            raise ValueError("this method reads the prompt: give the model `input_ids`, not `inputs_embeds` alone")
        is_real = attended(input_ids, given.get("attention_mask"), 0 if self._asked else n_seen(given))
        lists = [row[keep].tolist() for row, keep in zip(input_ids, is_real, strict=True)]
        return [tokens for tokens in lists for _ in range(len(read_by(self._given)) // len(lists))]  # beams

    def generate(self, plain_generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_generate` and remembers its prompt meanwhile."""
        if self._asked or (input_ids := asked(args, kwargs)) is None:
            return plain_generate(*args, **kwargs)
        self._asked = {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}
        try:
            return plain_generate(*args, **kwargs)
        finally:
            self._asked = {}

    def before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds the tokens."""
        given = self._given = called_with(base, args, kwargs)
        seen, q_len = n_seen(given), read_by(given).shape[1]
        is_real = attended(read_by(given), given.get("attention_mask"), seen)
        is_step = q_len == 1 and seen > 0
        n_prompt = self._asked["input_ids"].shape[1] if self._asked else seen + (0 if is_step else q_len)
        chosen, end = torch.zeros_like(is_real), n_prompt - seen
        if 0 < end <= q_len:
            last = (is_real[:, :end].long() * torch.arange(end, device=is_real.device)).argmax(1)
            chosen[torch.arange(len(last)), last] = True
        chosen[:, max(0, end) :] |= self._in_steps
        self.rows, self.positions = chosen.nonzero(as_tuple=True)


@contextmanager
def answering(model: nn.Module, *, in_steps: bool) -> Iterator[Answering]:
    """Inside, what is yielded knows of every forward which tokens answer: each prompt's last, `in_steps` the new ones.

    In `generate` the prompt is what that is given, however it is cut, cached or speculated on. In a plain call all
    tokens are one, but for a single token behind a cache, which was generated.
    """
    base, now = base_of(model), Answering(in_steps)
    plain_generate: Callable = base.generate  # pyright: ignore[reportAssignmentType]
    # On the instance alone, so that deleting it uncovers the class's own.
    vars(base)["generate"] = partial(now.generate, plain_generate)
    try:
        with base.register_forward_pre_hook(now.before, with_kwargs=True):
            yield now
    finally:
        del vars(base)["generate"]


@contextmanager
def hooked(base: PreTrainedModel) -> Iterator[None]:
    """Inside, a model runs uncompiled, since compiled graphs do not notice hooks, and does not batch continuously."""
    vars(base)["init_continuous_batching"] = _refuse_packing  # `generate_batch` goes through it
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        vars(base).pop("init_continuous_batching", None)


def _refuse_packing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "an attached model cannot batch continuously, which packs all prompts into one row: pad them and use `generate`"
    )
