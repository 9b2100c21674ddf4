"""A model while it is routed: every plain call is routed by the prompt it is given (section 5)."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from icrouting.attach import Attachment, attach
from icrouting.encoder import query_texts
from icrouting.families import base_of, decoder_of
from icrouting.pids import PIDs
from icrouting.router import Routing
from icrouting.scoring import score_options

Route = Callable[[Sequence[str]], Routing]


class Routed:
    """An attached model; comes from `InContextRouter.attached`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, route: Route):
        self._model, self._tokenizer, self._route = model, tokenizer, route

    def score(
        self, prompts: Sequence[str], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> Float[Tensor, "n_prompts n_options"]:
        """Returns each option's logit at the position after each prompt.

        Args:
            prompts: zero-shot prompts, ending right before the space and the answer ("Sentiment:").
            options: the answers to choose from, for all prompts or one list per prompt.
        """
        return score_options(self._model, self._tokenizer, prompts, options)

    def routing(self, prompts: Sequence[str]) -> Routing:
        """Returns what the router decides for prompts, without running the model."""
        return self._route(prompts)


class _Rerouter:
    """Gives every forward pass the routing of its prompt.

    A prefill (no cache, or an empty one) is routed by its own tokens. The routing is kept with the cache
    that the prefill fills, and holds for every later step with that cache. Inside `generate` the routing of
    the prompt holds for every forward, however the prompt is cut or speculated on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, route: Route, attachment: Attachment):
        self._tokenizer, self._route, self._attachment = tokenizer, route, attachment
        self._of_cache: weakref.WeakKeyDictionary[Cache, Routing] = weakref.WeakKeyDictionary()
        self._held: Routing | None = None

    def _of_rows(self, texts: list[str]) -> Routing:
        # Beams and samples repeat their query; each text is encoded once.
        order = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        routing = self._route(list(order))
        rows = torch.tensor([order[text] for text in texts], device=routing.head_gates.device)
        return Routing(routing.routing_vector[rows], routing.head_gates[rows])

    def _of_tokens(self, input_ids: Int[Tensor, "batch q_len"], mask: Any) -> Routing:
        rows = zip(input_ids, _attended(input_ids, mask), strict=True)
        return self._of_rows(query_texts(self._tokenizer, [row[keep].tolist() for row, keep in rows]))

    def generate(self, plain_generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls `plain_generate` with one routing for all of its forwards: the cache's, or the prompt's."""
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
        input_ids = next((value for value in given if isinstance(value, Tensor)), None)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache in self._of_cache:
            self._held = self._of_cache[cache]
        elif input_ids is not None and (cache is None or int(cache.get_seq_length()) == 0):
            self._held = self._of_tokens(input_ids, kwargs.get("attention_mask"))
        try:
            return plain_generate(*args, **kwargs)
        finally:
            self._held = None

    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache = given.get("past_key_values")
        if self._held is not None:
            self._attachment.routing = self._held
            if cache is not None:
                self._of_cache[cache] = self._held
            return
        if cache is not None and int(cache.get_seq_length()) > 0:
            if cache not in self._of_cache:
                raise ValueError(
                    "this cache is unknown here: it was filled outside `attached`, or is a copy; "
                    "start from the prompt inside it"
                )
            self._attachment.routing = self._of_cache[cache]
            return
        input_ids = given.get("input_ids")
        if input_ids is None:
            raise ValueError("a routed model needs `input_ids` to be routed by, got `inputs_embeds` alone")
        self._attachment.routing = self._of_tokens(input_ids, given.get("attention_mask"))
        if cache is not None:
            self._of_cache[cache] = self._attachment.routing

    def after_forward(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        cache = output.get("past_key_values") if isinstance(output, dict) else None
        if isinstance(cache, Cache) and cache not in self._of_cache and self._attachment.routing is not None:
            self._of_cache[cache] = self._attachment.routing


def _attended(input_ids: Int[Tensor, "batch q_len"], mask: Any) -> Bool[Tensor, "batch q_len"]:
    """Which prompt tokens are real, from any mask that `generate` or a user may hand to a prefill."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.ndim == 4:  # [batch, 1, q_len, kv_len]: a token is real if any token sees it
        seen = mask if mask.dtype == torch.bool else mask == 0
        mask = seen[:, 0, :, : input_ids.shape[1]].any(1)
    return mask[:, -input_ids.shape[1] :].bool().expand(len(input_ids), -1)


@contextmanager
def rerouted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pids: PIDs, route: Route) -> Iterator[None]:
    """Inside, plain calls of `model` are routed by `route`; on leaving, the model is as it was found."""
    decoder = decoder_of(model)
    with attach(model, pids) as attachment, ExitStack() as stack:
        rerouter = _Rerouter(tokenizer, route, attachment)
        stack.callback(decoder.register_forward_pre_hook(rerouter.before_forward, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(rerouter.after_forward).remove)
        base = base_of(model)
        plain_generate: Callable = base.generate  # pyright: ignore[reportAssignmentType]
        # On the instance alone, so that deleting it uncovers the class's own.
        vars(base)["generate"] = partial(rerouter.generate, plain_generate)
        stack.callback(vars(base).pop, "generate")
        yield
