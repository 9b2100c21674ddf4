"""Hooks: reading and changing what a decoder's blocks and branches give, without a trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icrouting.decoder.answering import Answering, answering
from icrouting.decoder.calls import called_with, read_by
from icrouting.decoder.families import base_of, stack_of
from icrouting.decoder.guards import Hook

# From a module's place among those that are edited and its states, the states in their stead.
Edit = Callable[[int, Tensor], Tensor]
# `edited` or `edited_inputs`: which side of the modules an edit is applied to.
Editor = Callable[[Sequence[nn.Module], Edit], AbstractContextManager[None]]


@contextmanager
def edited(
    modules: Sequence[nn.Module],
    edit: Edit,
    register: Callable[..., Any] = nn.Module.register_forward_hook,
) -> Iterator[None]:
    """Inside, modules give what `edit` makes of their outputs, [batch, q_len, hidden_size].

    A module that returns a tuple, as attention does, has the first part edited.

    Args:
        modules: the modules.
        edit: gets a module's place in `modules` and its output.
        register: how a hook comes upon a module; `edited_inputs` has another way.
    """

    def hook(place: int, module: nn.Module, *arguments: Any) -> Tensor | tuple:
        # A forward hook gets the inputs and the output, a pre-hook the inputs alone.
        states = arguments[-1]
        if isinstance(states, tuple):
            return (edit(place, states[0]), *states[1:])
        return edit(place, states)

    with ExitStack() as hooks:
        for place, module in enumerate(modules):
            hooks.enter_context(register(module, Hook(partial(hook, place))))
        yield


# Inside, modules are handed what `edit` makes of their first arguments.
edited_inputs: Editor = partial(edited, register=nn.Module.register_forward_pre_hook)


@contextmanager
def recorded(modules: Sequence[nn.Module], editor: Editor = edited) -> Iterator[list[Tensor]]:
    """Inside, the yielded list holds what each module gave in the latest forward.

    With `edited_inputs` as the editor it holds what each module was handed.
    """
    latest: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int, states: Tensor) -> Tensor:
        latest[place] = states
        return states

    with editor(modules, keep):
        yield latest


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the yielded dict counts the rows of a model's "forwards" and "backwards".

    A forward whose output has a gradient, or gets one at the vocabulary head, counts as one that is
    followed by a backward.
    """
    rows = {"forwards": 0, "backwards": 0}

    # Counted at the start, since a pass may end before the last layer.
    def begin(stack: nn.Module, args: tuple, kwargs: dict) -> None:
        rows["forwards"] += len(read_by(called_with(stack, args, kwargs)))

    def end(stack: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0]
        if hidden.requires_grad or _trains_head(model):
            rows["backwards"] += len(hidden)

    stack = stack_of(model)
    with (
        stack.register_forward_pre_hook(begin, with_kwargs=True),
        stack.register_forward_hook(end),
    ):
        yield rows


def _trains_head(model: nn.Module) -> bool:
    """Whether a pass that runs now gives the vocabulary head a gradient."""
    # Looked up each time, since LoRA may stand in its place.
    head = base_of(model).get_output_embeddings()
    if head is None or not torch.is_grad_enabled():
        return False
    return any(weight.requires_grad for weight in head.parameters())


def added(
    states: Float[Tensor, "*n_states hidden_size"], vectors: Tensor
) -> Float[Tensor, "*n_states hidden_size"]:
    """Returns states with vectors added in float32, one to each state or one to all."""
    return (states.float() + vectors.to(states.device)).to(states.dtype)


@contextmanager
def edited_last(
    model: nn.Module, modules: Sequence[nn.Module], edit: Edit, *, in_steps: bool = True
) -> Iterator[Answering]:
    """Inside, what modules give at the prompts' last tokens is what `edit` makes of it.

    Yields which tokens those are.

    Args:
        model: the model.
        modules: some of its blocks or branches.
        edit: gets a module's place in `modules` and the states [n_tokens, hidden_size].
        in_steps: whether tokens that are generated behind a prompt are edited too.
    """
    with answering(model, in_steps=in_steps) as tokens:

        def edit_tokens(place: int, hidden: Tensor) -> Tensor:
            # Layers may lie on devices of their own.
            rows = tokens.rows.to(hidden.device)
            positions = tokens.positions.to(hidden.device)
            # The module's own output stays as it is: others may hold it, and so may autograd.
            hidden = hidden.clone()
            hidden[rows, positions] = edit(place, hidden[rows, positions])
            return hidden

        with edited(modules, edit_tokens):
            yield tokens
