"""Several processes as one: who does which part, and how their results are joined.

The engine is accelerate's. Started by `accelerate launch` or `torchrun`, every process knows its
place; a process that was started by hand is alone, and everything here leaves things as they are.
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
    has_joined = bool(PartialState._shared_state)
    if has_joined:
        return PartialState()
    has_accelerator = torch.accelerator.is_available()
    state = PartialState(cpu=not has_accelerator, timeout=_PATIENCE)
    # The threads of gloo abort an interpreter that ends before them (pytorch #190489).
    if state.backend == "gloo":
        atexit.register(state.destroy_process_group)
    return state


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself alone, whatever the others do meanwhile."""
    # All instances of accelerate's state share these attributes, so the change holds everywhere.
    state = vars(here())
    state_before = dict(state)
    with ExitStack() as stack:
        stack.callback(state.update, state_before)
        state.update(num_processes=1, process_index=0, distributed_type=DistributedType.NO)
        yield


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks for all."""
    return here().is_main_process


def mine(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's share of a list that all have: every n-th item."""
    place = here()
    return items[place.process_index :: place.num_processes]


def wait() -> None:
    """Waits until all processes are here."""
    with _others():
        here().wait_for_everyone()


@contextmanager
def first_one_first() -> Iterator[None]:
    """Inside, the first process is alone until it leaves; then come the others."""
    # accelerate's `main_process_first` waits alike, but does not say that another process has died.
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
    """Checks that all processes were started with the same values.

    Raises:
        ValueError: names the first value that differs, and its versions.
    """
    values_by_process = joined([values])
    for name in values:
        versions = [process_values[name] for process_values in values_by_process]
        if any(version != versions[0] for version in versions):
            raise ValueError(
                f"the processes were started with different {name} ({versions}): "
                "give all of them the same"
            )


@contextmanager
def _others() -> Iterator[None]:
    """Inside, this process talks to others; ConnectionError where one of them has died."""
    try:
        yield
    # A RuntimeError too, but of this process itself.
    except torch.OutOfMemoryError:
        raise
    # All that torch.distributed raises where a process has died.
    except RuntimeError as error:
        raise ConnectionError(
            "another process has died or left: what was saved by then is kept, and the same "
            f"command goes on from there with any number of processes ({first_line(error)})"
        ) from error
