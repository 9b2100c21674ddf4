"""Several processes as one: who does which part, and how what they found is joined.

The engine is accelerate's. Started by `accelerate launch` or `torchrun`, every process knows its place; a process
that was started by hand is alone, and everything here leaves things as they are.
"""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

from icrouting.runtime.checks import first_line

T = TypeVar("T")

# A process may have to wait for a whole stage of another.
_PATIENCE = timedelta(days=1)


def here() -> PartialState:
    """Returns the place of this process; joins the others on the first call."""
    if PartialState._shared_state:
        return PartialState()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    if (
        state.backend == "gloo"
    ):  # whose threads abort an interpreter that ends before them (pytorch #190489)
        atexit.register(state.destroy_process_group)
    return state


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself alone, whatever the others do meanwhile."""
    state = vars(here())
    with ExitStack() as stack:
        stack.callback(state.update, dict(state))
        state.update(num_processes=1, process_index=0, distributed_type=DistributedType.NO)
        yield


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return here().is_main_process


def mine(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's share of a list that all have: every n-th item."""
    return items[here().process_index :: here().num_processes]


def wait() -> None:
    """Waits until all processes are here."""
    with _others():
        here().wait_for_everyone()


@contextmanager
def first_one_first() -> Iterator[None]:
    """Inside, the first process is alone until it leaves; then come the others."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def total(tensor: Tensor) -> Tensor:
    """Returns a tensor's sum over the processes, on all of them."""
    if here().num_processes == 1:
        return tensor
    moved = tensor.to(here().device)
    with _others():
        summed = reduce(moved, "sum")
    return summed.to(tensor.device)  # pyright: ignore[reportAttributeAccessIssue]


def decided(value: T) -> T:
    """Returns what the first process says, on all of them."""
    with _others():
        return broadcast_object_list([value])[0]


def joined(items: Sequence[T]) -> list[T]:
    """Returns the items of all processes, on all of them."""
    with _others():
        return gather_object(list(items))


def agree(**values: Any) -> None:
    """Checks that all processes were given the same; ValueError names what differs."""
    every = joined([values])
    for name in values:
        given = [one[name] for one in every]
        if any(value != given[0] for value in given):
            raise ValueError(
                f"the processes were started with different {name} ({given}): give all of them the same"
            )


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, and this process's own
        raise
    except RuntimeError as error:  # what torch.distributed raises where a process has died
        raise ConnectionError(
            "another process has died or left: what was computed is kept, and the same command goes on from there "
            f"with any number of processes ({first_line(error)})"
        ) from error
