"""Answering: which tokens of a forward pass answer a prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from icrouting.decoder.batches import attended
from icrouting.decoder.calls import asked, cache_of, called_with, n_seen, read_by
from icrouting.decoder.families import base_of
from icrouting.decoder.hold import replaced


@dataclass
class _Run:
    """One `generate`: its prompt, how many tokens that has with those before it in a cache, and the cache it fills."""

    input_ids: Tensor | None
    mask: Tensor | None
    n_prompt: int
    cache: object

    def reads(self, given: dict[str, Any]) -> bool:
        """Whether a forward inside is one of its own; others may have another cache, or another prompt without one."""
        cache = cache_of(given)
        self.cache = self.cache if self.cache is not None else cache  # the first forward is its own
        if cache is not None:
            return cache is self.cache
        return (
            (ids := given.get("input_ids")) is None
            or self.input_ids is None
            or _goes_on(ids, self.input_ids)
        )


def _goes_on(ids: Int[Tensor, "n_rows q_len"], prompt: Int[Tensor, "n_prompts n_tokens"]) -> bool:
    """Whether rows begin with the prompts, each one's side by side."""
    times, over = divmod(len(ids), len(prompt))
    return not over and torch.equal(
        ids[:, : prompt.shape[1]], prompt.repeat_interleave(times, 0).to(ids.device)
    )


class Answering:
    """Which tokens answer in the forward that runs: `rows` and `positions`, one each; comes from `answering`."""

    rows: Int[Tensor, "n_tokens"]
    positions: Int[Tensor, "n_tokens"]

    def __init__(self, in_steps: bool):
        self._in_steps, self._given = in_steps, {}
        self._runs: list[_Run] = []
        self._run: _Run | None = None

    def prompts(self) -> list[list[int]]:
        """Returns the tokens of every row's prompt, without those that an earlier call put into the cache."""
        given, run = self._given, self._run
        input_ids, mask = (
            (run.input_ids, run.mask)
            if run
            else (given.get("input_ids"), given.get("attention_mask"))
        )
        if input_ids is None:
            raise ValueError(
                "this method reads the prompt: give the model `input_ids`, not `inputs_embeds` alone"
            )
        is_real = attended(
            input_ids, mask, run.n_prompt - input_ids.shape[1] if run else n_seen(given)
        )
        lists = [row[keep].tolist() for row, keep in zip(input_ids, is_real, strict=True)]
        return [
            tokens for tokens in lists for _ in range(len(read_by(given)) // len(lists))
        ]  # beams

    def generate(self, plain_generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_generate` and remembers its prompt meanwhile."""
        ids, mask, seen = asked(args, kwargs), kwargs.get("attention_mask"), n_seen(kwargs)
        read = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else ids
        if read is None:
            return plain_generate(*args, **kwargs)
        n_tokens = read.shape[1] + (
            seen if read.shape[1] <= seen else 0
        )  # all of them, or those behind the cache
        n_prompt = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else n_tokens
        run = _Run(ids, mask, n_prompt, cache_of(kwargs))
        outer = self._runs[-1] if self._runs else None
        if (
            outer
            and ids is not None
            and outer.input_ids is not None
            and _goes_on(ids, outer.input_ids)
        ):  # it drafts
            run = replace(outer, cache=run.cache)
        self._runs.append(run)
        try:
            return plain_generate(*args, **kwargs)
        finally:
            self._runs.pop()

    def before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds the tokens."""
        given = self._given = called_with(base, args, kwargs)
        seen, q_len = n_seen(given), read_by(given).shape[1]
        is_real = attended(read_by(given), given.get("attention_mask"), seen)
        self._run = self._runs[-1] if self._runs and self._runs[-1].reads(given) else None
        is_step = q_len == 1 and seen > 0
        n_prompt = self._run.n_prompt if self._run else seen + (0 if is_step else q_len)
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
    with (
        replaced(base, generate=partial(now.generate, plain_generate)),
        base.register_forward_pre_hook(now.before, with_kwargs=True),
    ):
        yield now
