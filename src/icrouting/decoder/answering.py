"""Answering: which tokens of a forward pass answer a prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from icrouting.decoder.calls import Call
from icrouting.decoder.families import base_of
from icrouting.decoder.tracking import tracked


class Answering:
    """Which tokens answer in the forward that runs; comes from `answering`.

    Outside of a forward of the whole model there are none, and whoever asks gets an error: those of
    the forward before it would be wrong.
    """

    def __init__(self, in_steps: bool):
        self._in_steps = in_steps
        # The forward that runs, with the row and the column of each token that answers.
        self._running: tuple[Call, Tensor, Tensor] | None = None

    @property
    def rows(self) -> Int[Tensor, "n_tokens"]:
        """The row of each token that answers."""
        return self._now()[1]

    @property
    def positions(self) -> Int[Tensor, "n_tokens"]:
        """Its column among the tokens of this forward."""
        return self._now()[2]

    def _now(self) -> tuple[Call, Tensor, Tensor]:
        if self._running is None:
            raise ValueError(
                "this method edits what answers a prompt: call the whole model, not a part of it, "
                "and without checkpointing that runs a layer again"
            )
        return self._running

    def prompts(self) -> list[list[int]]:
        """Returns the tokens of every row's prompt, without those that an earlier call cached."""
        call = self._now()[0]
        prompts = call.prompts()
        if prompts is None:
            raise ValueError(
                "this method reads the prompt: give the model `input_ids`, "
                "not `inputs_embeds` alone"
            )
        token_lists = prompts.token_lists()
        n_rows_each = call.n_rows // len(token_lists)
        # The beams of a prompt stand side by side.
        return [tokens for tokens in token_lists for _ in range(n_rows_each)]

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        """Finds the tokens of a forward that is due, and runs it."""
        running_before = self._running
        self._running = (call, *self._find(call))
        try:
            return run()
        finally:
            self._running = running_before

    def _find(self, call: Call) -> tuple[Tensor, Tensor]:
        """Returns the rows and the columns of the tokens that answer."""
        is_real = call.is_real
        answers = torch.zeros_like(is_real)
        # The column behind the prompt's last: a cut prompt ends beyond this forward, a step begins
        # behind it.
        end = call.n_prompt - call.n_seen
        if 0 < end <= call.q_len:
            columns = torch.arange(end, device=is_real.device)
            last = (is_real[:, :end].long() * columns).argmax(1)
            rows = torch.arange(len(last), device=last.device)
            answers[rows, last] = True
        if self._in_steps:
            answers[:, max(0, end) :] = True
        rows, positions = answers.nonzero(as_tuple=True)
        return rows, positions


@contextmanager
def answering(model: nn.Module, *, in_steps: bool) -> Iterator[Answering]:
    """Inside, what is yielded knows of every forward which tokens answer.

    Those are each prompt's last and, with `in_steps`, the new ones. In `generate` the prompt is
    what that is given, however it is cut, cached or speculated on. In a plain call all tokens are
    one, but for a single token behind a cache, which was generated.
    """
    now = Answering(in_steps)
    # The model itself is watched, since one of images hands its decoder embeddings alone.
    with tracked(base_of(model), model, now.around):
        yield now
