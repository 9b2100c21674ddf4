"""Edits: reading and changing what a decoder's blocks and branches give, by hooks that leave no trace."""

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

Edit = Callable[[int, Tensor], Tensor]
Editor = Callable[[Sequence[nn.Module], Edit], AbstractContextManager[None]]


@contextmanager
def edited(
    modules: Sequence[nn.Module],
    edit: Edit,
    register: Callable[..., Any] = nn.Module.register_forward_hook,
) -> Iterator[None]:
    """Inside, a module gives what `edit` makes of its place in `modules` and its output, [batch, q_len, hidden_size].

    A module that returns a tuple, as attention does, has the first part edited.
    """

    def hook(place: int, module: nn.Module, *given: Any) -> Tensor | tuple:
        last = given[-1]  # the output; of a module that has not run, its arguments
        return (edit(place, last[0]), *last[1:]) if isinstance(last, tuple) else edit(place, last)

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.enter_context(register(module, partial(hook, place)))
        yield


# Inside, a module is given what `edit` makes of its place in `modules` and its first argument.
edited_inputs: Editor = partial(edited, register=nn.Module.register_forward_pre_hook)


@contextmanager
def recorded(modules: Sequence[nn.Module], by: Editor = edited) -> Iterator[list[Tensor]]:
    """Inside, the yielded list holds what each module gave, or by `edited_inputs` was given, in the latest forward."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int, output: Tensor) -> Tensor:
        outputs[place] = output
        return output

    with by(modules, keep):
        yield outputs


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the yielded dict counts the rows that a model runs forwards, and those of them with a gradient.

    A forward whose output has a gradient, or gets one at the vocabulary head, counts as one that is followed by a
    backward.
    """
    rows = {"forwards": 0, "backwards": 0}

    def begin(
        decoder: nn.Module, args: tuple, kwargs: dict
    ) -> None:  # a pass may end before the last layer
        rows["forwards"] += len(read_by(called_with(decoder, args, kwargs)))

    def end(decoder: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0]
        head = base_of(
            model
        ).get_output_embeddings()  # asked for each time, since LoRA may stand in its place
        weights = head.parameters() if head is not None and torch.is_grad_enabled() else ()
        trains_head = any(weight.requires_grad for weight in weights)
        rows["backwards"] += len(hidden) if hidden.requires_grad or trains_head else 0

    decoder = stack_of(model)
    with (
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end),
    ):
        yield rows


def added(
    states: Float[Tensor, "*n_states hidden_size"], vectors: Tensor
) -> Float[Tensor, "*n_states hidden_size"]:
    """Returns states with vectors added in float32, one to each state or one to all."""
    return (states.float() + vectors.to(states.device)).to(states.dtype)


@contextmanager
def edited_last(
    model: nn.Module, modules: Sequence[nn.Module], edit: Edit, *, in_steps: bool = True
) -> Iterator[Answering]:
    """Inside, the states at the prompts' last tokens, of those that a module gives, are what `edit` makes of them.

    It gets a module's place in `modules`, some of the decoder's blocks or branches, and the states [n_tokens,
    hidden_size]; `in_steps` says whether tokens that are generated behind a prompt are edited too. Yields which those
    tokens are.
    """
    with answering(model, in_steps=in_steps) as now:

        def change(place: int, hidden: Tensor) -> Tensor:
            at = now.rows.to(hidden.device), now.positions.to(hidden.device)
            hidden = hidden.clone()
            hidden[at] = edit(place, hidden[at])
            return hidden

        with edited(modules, change):
            yield now
