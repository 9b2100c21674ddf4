"""Holds: a model is one method's alone, runs one call at a time, and keeps its own methods."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import update_wrapper
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from icrouting.decoder.families import base_of

# The name of the method that holds each model, None for none.
_held: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
# Each held model's lock: whoever runs the model has it for as long as that takes.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock]
_locks = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and takes no gradients; then it is as it was found."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.eval().requires_grad_(False)
        yield


@contextmanager
def replaced(model: nn.Module, **methods: Callable) -> Iterator[None]:
    """Inside, a model has other methods, on the instance alone; then it has again what it had.

    What somebody else put in their place meanwhile stays.
    """
    attributes = vars(model)
    # What already stood there on the instance, over the methods of its class.
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name, method in methods.items():
            if attributes.get(name) is not method:
                continue
            if name in before:
                attributes[name] = before[name]
            else:
                del attributes[name]


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that lets other threads pass, which may run the same model meanwhile."""
    thread = threading.get_ident()

    def run(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return run


class Uncopied:
    """What belongs to an attached model, and keeps the model from being copied or pickled.

    A copy would have our hooks forever, and share what they remember with the model itself.
    """

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(
            "a model cannot be copied or pickled while a method is attached to it: leave the "
            "method first, or save the weights with `save_pretrained`"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})


class Wrapped(Uncopied):
    """A model's own method with something around it, which has the method's signature."""

    def __init__(self, method: Callable, around: Callable[..., Any]):
        update_wrapper(self, method)
        self._method = method
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `around` with the method and its arguments."""
        return self._around(self._method, *args, **kwargs)


def lock_of(model: nn.Module) -> AbstractContextManager[bool]:
    """Returns a model's lock, which the same thread may take again."""
    base = base_of(model)
    with _locks_lock:
        if base not in _locks:
            _locks[base] = threading.RLock()
        return _locks[base]


def _nothing_to_check() -> None:
    """What stands for a check where there is none."""


class Hold:
    """One method's hold on a model, from entering until leaving.

    Attributes:
        lock: whoever runs the model has it for as long as that takes.
        is_over: whether the method has been left.
        check: raises where the model is not any more what the method was attached to.
    """

    def __init__(self, model: nn.Module):
        self.lock = lock_of(model)
        self.check: Callable[[], None] = _nothing_to_check
        self.is_over = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other thread runs the model; RuntimeError once the method has been left."""
        with self.lock:
            if self.is_over:
                raise RuntimeError(
                    "the model is no longer attached: use what was attached, and call `backward` "
                    "on what it computed, inside its `with`"
                )
            self.check()
            yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Waits for a call in flight; from then on the hold is over, and `turn` an error."""
        with self.lock:
            self.is_over = True
            yield


def check_alone(model: nn.Module, name: str) -> None:
    """Checks that no method is attached to a model: another would learn under it, or add to it.

    ValueError names the one that is.
    """
    other = _held.get(base_of(model))
    if other is not None:
        raise ValueError(
            f"{other} is attached to this model: leave it before {name} is fitted or attached"
        )


@contextmanager
def hooked(
    base: PreTrainedModel, name: str, hooks: AbstractContextManager[object]
) -> Iterator[Hold]:
    """Inside, a model is under a method's hooks, and that method's alone.

    It runs uncompiled and one call at a time, whatever threads call it, and refuses
    `generate_batch`. Leaving waits for a call in flight.

    Args:
        base: the model.
        name: the method, as errors are to name it.
        hooks: inside, the method's hooks are on the model; may hold the model itself, as a
            router's do.

    Raises:
        ValueError: a method is attached to the model already.
    """
    # Before the lock too, so that nobody waits for a call to end and is refused then.
    check_alone(base, name)
    hold = Hold(base)

    def in_turn(method: Callable, *args: Any, **kwargs: Any) -> Any:
        # A call that waited until the method was left is a plain one.
        with hold.lock:
            return method(*args, **kwargs)

    with ExitStack() as leaving:
        # Two threads that enter, or one that enters while another calls, take turns.
        with hold.lock:
            check_alone(base, name)
            leaving.enter_context(hooks)
            outer_name = _held.get(base)
            leaving.callback(_held.__setitem__, base, outer_name)
            _held[base] = name
            generate: Callable = base.generate  # pyright: ignore[reportAssignmentType]
            leaving.enter_context(
                replaced(
                    base,
                    forward=Wrapped(base.forward, in_turn),
                    generate=Wrapped(generate, in_turn),
                    init_continuous_batching=_refuse_packing,
                )
            )
            leaving.enter_context(_uncompiled)
        try:
            yield hold
        finally:
            with hold.ending():
                leaving.close()


def _refuse_packing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "an attached model cannot batch continuously, which packs all prompts into one row: "
        "pad them"
    )


class _Uncompiled:
    """Inside, nothing runs compiled, since a compiled graph does not notice hooks.

    It is one for the process: models may be left in another order than they were entered.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._n_inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()
