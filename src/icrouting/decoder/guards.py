"""Guards: what keeps an attached model from being run by two threads at once, copied or pickled."""

import copy
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import update_wrapper
from typing import Any

from torch import nn

# Whoever runs a held model, or tries what it is, has its lock for as long as that takes.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock]
_locks = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(base: nn.Module) -> AbstractContextManager[bool]:
    """Returns a model's lock, which the same thread may take again."""
    with _locks_lock:
        if base not in _locks:
            _locks[base] = threading.RLock()
        return _locks[base]


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that lets other threads pass, which may run the same model meanwhile."""
    thread = threading.get_ident()

    def run(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return run


def refuse_copy() -> None:
    """Raises what an attached model says to whoever copies or pickles it.

    A copy would have our hooks forever, and share what they remember with the model itself.
    """
    raise RuntimeError(
        "a model cannot be copied or pickled while a method is attached to it: leave the "
        "method first, or save the weights with `save_pretrained`"
    )


class Uncopied:
    """What belongs to an attached model, and keeps the model from being copied or pickled."""

    def __deepcopy__(self, memo: Any) -> Any:
        refuse_copy()

    def __reduce__(self) -> Any:
        refuse_copy()


class Hook(Uncopied):
    """A hook of a module, which keeps the module from being copied or pickled."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self._function(*args)


class Wrapped(Uncopied):
    """A model's own method with something around it, which has the method's signature.

    Somebody may hold on to it after it was taken away: then it is the method itself.
    """

    def __init__(self, method: Callable, around: Callable[..., Any], is_over: Callable[[], bool]):
        update_wrapper(self, method)
        self._method = method
        self._around = around
        self._is_over = is_over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `around` with the method and its arguments."""
        if self._is_over():
            return self._method(*args, **kwargs)
        return self._around(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        if not self._is_over():
            refuse_copy()
        return copy.deepcopy(self._method, memo)

    def __reduce__(self) -> Any:
        if not self._is_over():
            refuse_copy()
        return self._method.__reduce__()
