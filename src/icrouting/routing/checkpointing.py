"""Checkpointing: a layer that runs again for its gradients is routed as it was the first time.

With activation (gradient) checkpointing a layer drops what it computed, and runs again in the
backward pass. Other prompts may have been routed meanwhile, so each run takes its own pass along.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from icrouting.decoder.guards import Uncopied
from icrouting.routing.attachment import Attachment

# Where transformers keeps a layer's checkpointing function, once it is enabled.
_FUNCTION = "_gradient_checkpointing_func"


class _Following(Uncopied):
    """A checkpointing function under which what runs again is routed as it was."""

    def __init__(self, plain: Callable, attachment: Attachment):
        self.plain = plain
        self._attachment = attachment

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function`, which is run now and again in the backward pass."""
        attachment = self._attachment
        routed_pass = attachment.current

        def run(*args: Any, **kwargs: Any) -> Any:
            # After leaving there are no hooks any more, and it would run again unrouted.
            with attachment.hold.turn(), attachment.running(routed_pass):
                return function(*args, **kwargs)

        return self.plain(run, *args, **kwargs)


@contextmanager
def checkpointing_followed(
    modules: Sequence[nn.Module], attachment: Attachment
) -> Iterator[Callable[[], None]]:
    """Inside, what runs again for its gradients is routed as it was.

    Yields what each pass is to call first, as checkpointing may be enabled at any time.

    Args:
        modules: those that may have a checkpointing function: the stack and its layers.
        attachment: the attachment that routes them.
    """

    def take_up() -> None:
        for module in modules:
            function = vars(module).get(_FUNCTION)
            if function is not None and not isinstance(function, _Following):
                setattr(module, _FUNCTION, _Following(function, attachment))

    try:
        yield take_up
    finally:
        for module in modules:
            function = vars(module).get(_FUNCTION)
            if isinstance(function, _Following):
                setattr(module, _FUNCTION, function.plain)
