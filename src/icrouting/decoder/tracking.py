"""Tracking: which prompt a forward pass is part of, in a plain call and inside `generate`.

`generate` may cut its prompt into pieces, draft behind it, widen it to beams, or run other prompts
meanwhile. A tracker wraps it once, and describes every forward to whoever edits or routes the
model.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import Signature, signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.calls import Call, Generation, cache_of, generate_ids, n_seen, named
from icrouting.decoder.families import base_of
from icrouting.decoder.guards import Uncopied, Wrapped
from icrouting.decoder.hold import Hold, replaced

# From a forward that is due and what runs it, the forward's output.
Around = Callable[[Call, Callable[[], Any]], Any]

# What the whole model takes beside text begins with one of these.
_NO_TEXT = ("pixel_values", "image", "video", "audio", "input_features")


class PromptTracker(Uncopied):
    """Tells `around` of every forward which prompt it is part of."""

    def __init__(self, around: Around, hold: Hold | None):
        self._around = around
        self._hold = hold
        self._generations: list[Generation] = []
        # All that run, those without a prompt too.
        self._n_generating = 0
        # What the whole model was called with, while it runs.
        self._outer_arguments: dict[str, Any] = {}

    def generate(self, plain_generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_generate`, and remembers its prompt meanwhile."""
        generation = self._begun(args, kwargs)
        self._n_generating += 1
        if generation is not None:
            self._generations.append(generation)
        try:
            return plain_generate(*args, **kwargs)
        finally:
            self._n_generating -= 1
            if generation is not None:
                self._generations.pop()
                # Whoever remembers this generation must not keep its keys and values alive.
                generation.cache = None

    def _begun(self, args: tuple, kwargs: dict[str, Any]) -> Generation | None:
        """Returns what `generate` was given; None where that is no prompt at all."""
        input_ids = generate_ids(args, kwargs)
        embeddings = kwargs.get("inputs_embeds")
        whole = input_ids if embeddings is None else embeddings
        if whole is None:
            return None
        cache = cache_of(kwargs)
        outer = self._generations[-1] if self._generations else None
        if outer is not None and outer.begins(input_ids):
            # A draft goes on from the prompt of the generation that asks for it: it is none of its
            # own.
            return replace(outer, cache=cache)
        mask = kwargs.get("attention_mask")
        n_cached = n_seen(kwargs)
        n_prompt = whole.shape[1]
        if n_cached > 0:
            # Users may give all tokens, or only those behind the cache; a mask counts them all.
            if isinstance(mask, Tensor) and mask.ndim == 2:
                n_prompt = mask.shape[1]
            elif n_prompt <= n_cached:
                n_prompt += n_cached
        return Generation(input_ids, mask, n_cached, n_prompt, cache)

    def whole_forward(
        self, signature: Signature, plain_forward: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls the `plain_forward` of what is around the stack, and remembers its arguments.

        A model of images and text embeds its tokens itself, and hands its stack embeddings alone.
        """
        arguments_before = self._outer_arguments
        self._outer_arguments = named(signature, args, kwargs)
        try:
            return plain_forward(*args, **kwargs)
        finally:
            self._outer_arguments = arguments_before

    def prepare_inputs(self, plain_prepare: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_prepare`, which every `generate` does before each of its forwards."""
        if not self._n_generating:
            raise RuntimeError(
                "this `generate` began before the method was attached, or was taken from the model "
                "before: call the attached model's own"
            )
        return plain_prepare(*args, **kwargs)

    def forward(
        self, signature: Signature, plain_forward: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """Has `around` call the watched module's `plain_forward`."""
        arguments = self._with_ids(named(signature, args, kwargs))
        innermost, outermost = None, None
        if self._generations:
            outermost = self._generations[0]
            # A forward cannot be part of one further out: that waits until this one is done.
            innermost = self._generations[-1]
            innermost.note(arguments)
        call = Call(arguments, innermost, outermost)
        return self._around(call, lambda: plain_forward(*args, **kwargs))

    def around(
        self, plain: Callable, tracked_call: Callable[..., Any], *, is_forward: bool = False
    ) -> Wrapped:
        """Returns a method of the model with one of the four above around it.

        Threads take turns at a held model, which each forward finds as it was when it was attached.
        """
        held = partial(tracked_call, plain)
        if self._hold is None:
            return Wrapped(plain, tracked_call, _never)
        return self._hold.in_turn(plain, held, is_forward=is_forward)

    def _with_ids(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns a stack's arguments with the ids that the whole model embedded for it."""
        embeddings = arguments.get("inputs_embeds")
        input_ids = self._outer_arguments.get("input_ids")
        if arguments.get("input_ids") is not None or embeddings is None or input_ids is None:
            return arguments
        if input_ids.shape != embeddings.shape[:2]:
            return arguments
        for name, value in self._outer_arguments.items():
            if value is not None and name.startswith(_NO_TEXT):
                raise ValueError(
                    f"an attached model reads text alone: call it without `{name}`, or leave the "
                    "method first"
                )
        mask = self._outer_arguments.get("attention_mask")
        return arguments | {"input_ids": input_ids, "attention_mask": mask}


@contextmanager
def tracked(
    module: nn.Module, model: nn.Module, around: Around, hold: Hold | None = None
) -> Iterator[None]:
    """Inside, `around` is told of every forward of a module which prompt it is part of.

    Args:
        module: the model itself, or the stack of layers in it that its forwards go through.
        model: the model whose `generate` is watched.
        around: called with each forward that is due and with what runs it; returns its output.
        hold: the hold on the model, so that forwards of the stack take turns too.
    """
    base = base_of(model)
    tracker = PromptTracker(around, hold)
    generate: Callable = base.generate  # pyright: ignore[reportAssignmentType]
    prepare: Callable = base.prepare_inputs_for_generation  # pyright: ignore[reportAssignmentType]
    with ExitStack() as leaving:
        leaving.enter_context(
            replaced(
                base,
                generate=tracker.around(generate, tracker.generate),
                prepare_inputs_for_generation=tracker.around(prepare, tracker.prepare_inputs),
            )
        )
        for outer in _around(module, base):
            whole_forward = partial(tracker.whole_forward, signature(outer.forward))
            outer_forward = tracker.around(outer.forward, whole_forward, is_forward=True)
            leaving.enter_context(replaced(outer, forward=outer_forward))
        forward = partial(tracker.forward, signature(module.forward))
        tracked_forward = tracker.around(module.forward, forward, is_forward=True)
        leaving.enter_context(replaced(module, forward=tracked_forward))
        yield


def _around(module: nn.Module, base: nn.Module) -> list[nn.Module]:
    """Returns the whole models that a module is inside of, the outermost first."""
    outer_models = []
    for candidate in base.modules():
        is_around = candidate is not module and any(part is module for part in candidate.modules())
        if is_around and isinstance(candidate, PreTrainedModel):
            outer_models.append(candidate)
    return outer_models


def _never() -> bool:
    return False
