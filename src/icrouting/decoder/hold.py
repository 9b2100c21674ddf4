"""Holds: a model is one method's alone, runs one call at a time, and keeps its own methods."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from icrouting.decoder.families import base_of
from icrouting.decoder.guards import Wrapped, lock_of
from icrouting.decoder.places import HookedModules

# The name of the method that holds each model, None for none.
_held: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


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
    try:
        attributes.update(methods)
        yield
    finally:
        for name, method in methods.items():
            if attributes.get(name) is not method:
                continue
            if name in before:
                attributes[name] = before[name]
            else:
                del attributes[name]


def _nothing_to_check() -> None:
    """What stands for a check where there is none."""


class Hold:
    """One method's hold on a model, from entering until leaving.

    Attributes:
        base: the model.
        lock: whoever runs the model has it for as long as that takes.
        hooked_modules: the modules that the method has hooks on.
        is_over: whether the method has been left.
        check: raises where the model is not any more what the method was attached to.
        follows_checkpointing: whether layers that run again for their gradients are seen to.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.lock = lock_of(base)
        self.hooked_modules = HookedModules(base)
        self.check: Callable[[], None] = _nothing_to_check
        self.is_over = False
        self.follows_checkpointing = True
        self._is_running = False
        self._checkpointed = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]
        # Whether it was left, by an interrupt, while a call was running.
        self._was_cut = False

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
        try:
            self.lock.__enter__()
        except BaseException:
            # Nobody waits any longer: the call in flight is told at its end.
            self.is_over = True
            self._was_cut = True
            raise
        try:
            self.is_over = True
            yield
        finally:
            self.lock.__exit__(None, None, None)

    def in_turn(self, plain: Callable, held: Callable, *, is_forward: bool = False) -> Wrapped:
        """Returns what stands for a method of the model: each call waits for its turn.

        Args:
            plain: the method, which is called once the hold is over.
            held: what is called until then.
            is_forward: whether this is a forward, which needs the model as it was.
        """

        def take_turn(_: Callable, *args: Any, **kwargs: Any) -> Any:
            with self._locks(kwargs.get("assistant_model")):
                # A call that waited until the method was left is a plain one.
                if self.is_over:
                    return plain(*args, **kwargs)
                with self._running() if is_forward else nullcontext():
                    result = held(*args, **kwargs)
            if self._was_cut:
                raise RuntimeError(
                    "the method was left, by an interrupt, while this call was running"
                )
            return result

        return Wrapped(plain, take_turn, lambda: self.is_over)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Inside, a forward runs, before which the model was looked at."""
        is_inner = self._is_running
        if not is_inner:
            if torch.is_grad_enabled() and not self.follows_checkpointing:
                self._refuse_checkpointing()
            self.check()
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = is_inner

    @contextmanager
    def _locks(self, assistant: Any) -> Iterator[None]:
        """Inside, this thread has the model's lock, and that of a model that drafts for it."""
        locks = {id(self.lock): self.lock}
        if isinstance(assistant, nn.Module):
            assistants_lock = lock_of(base_of(assistant))
            locks[id(assistants_lock)] = assistants_lock
        with ExitStack() as leaving:
            # In one order for all, or two models that draft for one another wait forever.
            for _, lock in sorted(locks.items()):
                leaving.enter_context(lock)
            yield

    def _refuse_checkpointing(self) -> None:
        for module in self._checkpointed:
            if module.training and module.gradient_checkpointing:
                raise ValueError(
                    "under this method layers must not run again for their gradients, as they "
                    "would not be told of which prompt: switch gradient checkpointing off"
                )


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
    with ExitStack() as leaving:
        # Two threads that enter, or one that enters while another calls, take turns.
        with hold.lock:
            check_alone(base, name)
            leaving.enter_context(hooks)
            hold.hooked_modules.note()
            outer_name = _held.get(base)
            leaving.callback(_held.__setitem__, base, outer_name)
            _held[base] = name
            generate: Callable = base.generate  # pyright: ignore[reportAssignmentType]
            leaving.enter_context(
                replaced(
                    base,
                    forward=hold.in_turn(base.forward, base.forward, is_forward=True),
                    generate=hold.in_turn(generate, generate),
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
