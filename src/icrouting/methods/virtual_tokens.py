"""Virtual tokens: a soft prompt before a frozen model's prompts, without a trace."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache

from icrouting.decoder.batches import context_length
from icrouting.decoder.calls import n_seen, read_by
from icrouting.decoder.families import CACHE, stack_of
from icrouting.decoder.hold import frozen
from icrouting.methods.adapters import load_peft
from icrouting.runtime.defaults import usual_defaults


@contextmanager
def in_front(
    base: PreTrainedModel, kind: str, prompt: Float[Tensor, "n_virtual width"]
) -> Iterator[nn.Parameter]:
    """Inside, a soft prompt stands before every prompt of a model.

    The model's outputs are those of the prompt's own tokens. peft makes the embeddings or the
    cache; its wrapper would answer for the virtual tokens too, and leave the model that others hold
    without them. They stand before padding on the left, as in peft, so a sliding window that is
    shorter than padding and prompt together reaches fewer of them there.

    Args:
        base: The model.
        kind: peft's configuration of the soft prompt: of embeddings, or of keys and values.
        prompt: The embeddings, or keys and values of all layers in peft's order.

    Yields:
        The soft prompt as a parameter, in float32.
    """
    wrapped = _wrapped(base, kind, prompt)
    weight = wrapped.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    front = _Front(base, len(prompt), wrapped.get_prompt)
    decoder = stack_of(base)
    with (
        frozen(base),
        decoder.register_forward_pre_hook(front.before, with_kwargs=True),
        decoder.register_forward_hook(front.after),
    ):
        yield weight


@usual_defaults()
def _wrapped(base: PreTrainedModel, kind: str, prompt: Float[Tensor, "n_virtual width"]) -> Any:
    """Returns peft's wrapper of a model, with a soft prompt of this size."""
    peft = load_peft()
    options: dict[str, int] = {"num_virtual_tokens": len(prompt)}
    if kind == "PromptTuningConfig":
        # peft would take the hidden size, where OPT's embeddings may be narrower.
        options["token_dim"] = prompt.shape[1]
    with frozen(base), torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers for things by an old name.
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(base, config)


class _Front:
    """The hooks that put a soft prompt before a decoder's tokens and cut it off again.

    Attributes:
        n_added: Tokens that the forward under way reads beyond those of its caller.
        hides_cache: Whether its caller is to get no cache, having neither given nor wanted one.
    """

    def __init__(
        self, base: PreTrainedModel, n_virtual: int, make_prompt: Callable[[int], Tensor | Cache]
    ):
        self._base = base
        self._n_virtual = n_virtual
        self._make_prompt = make_prompt
        self.n_added = 0
        self.hides_cache = False

    def before(
        self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Returns the decoder's arguments with the soft prompt before them."""
        arguments = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        wants_cache = arguments.get("use_cache")
        if wants_cache is None:
            wants_cache = stack_of(self._base).config.use_cache
        # A prefix comes in a cache of ours, which such a caller must not go on with.
        self.hides_cache = arguments.get(CACHE) is None and not wants_cache
        arguments, self.n_added = self._with_prompt(arguments)
        return (), arguments

    def after(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        """Returns the decoder's output for the tokens of its caller."""
        hidden = output[0][:, self.n_added :]
        if isinstance(output, tuple):
            # The cache stands right behind the states.
            rest = output[2:] if self.hides_cache else output[1:]
            return (hidden, *rest)
        fields = {**output, "last_hidden_state": hidden}
        if self.hides_cache:
            fields[CACHE] = None
        return type(output)(**fields)

    def _with_prompt(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Returns arguments with the soft prompt, and the number of tokens that this adds."""
        _check_layout(arguments)
        if _counts_cache(arguments):
            return arguments, 0
        n_rows, q_len = read_by(arguments).shape[:2]
        arguments = self._counted(arguments, n_rows)
        # The prompt went into the cache with the first tokens.
        if n_seen(arguments):
            return arguments, 0
        limit = context_length(self._base)
        if limit and self._n_virtual + q_len > limit:
            raise ValueError(
                f"{q_len} tokens behind {self._n_virtual} virtual ones exceed the context of "
                f"{limit}: shorten them"
            )
        prompt = self._make_prompt(n_rows)
        if isinstance(prompt, Cache):
            cache = _filled(arguments.get(CACHE), prompt)
            return {**arguments, CACHE: cache}, 0
        return self._behind_embeddings(arguments, prompt), self._n_virtual

    def _counted(self, arguments: dict[str, Any], n_rows: int) -> dict[str, Any]:
        """Returns arguments whose mask and positions count the virtual tokens in front."""
        counted = dict(arguments)
        # Where there is no mask, all tokens are attended, the virtual ones too.
        mask = arguments.get("attention_mask")
        if mask is not None:
            ones = mask.new_ones(n_rows, self._n_virtual)
            counted["attention_mask"] = torch.cat([ones, mask], 1)
        positions = arguments.get("position_ids")
        if positions is not None:
            counted["position_ids"] = positions + self._n_virtual
        return counted

    def _behind_embeddings(
        self, arguments: dict[str, Any], prompt: Float[Tensor, "batch n_virtual width"]
    ) -> dict[str, Any]:
        """Returns arguments with embeddings: the soft prompt's, then the tokens'."""
        inputs = read_by(arguments)
        n_rows = len(inputs)
        # A caller may have embedded the tokens already.
        embeds = inputs
        if not inputs.is_floating_point():
            embed = stack_of(self._base).get_input_embeddings()
            embeds = embed(inputs)
        inputs_embeds = torch.cat([prompt.to(embeds), embeds], 1)
        prepended = {**arguments, "input_ids": None, "inputs_embeds": inputs_embeds}
        positions = arguments.get("position_ids")
        if positions is not None:
            # One row of positions may stand for all rows.
            first = torch.arange(self._n_virtual, device=positions.device)
            both = [first.expand(n_rows, -1), positions.expand(n_rows, -1)]
            prepended["position_ids"] = torch.cat(both, 1)
        return prepended


def _check_layout(arguments: Mapping[str, Any]) -> None:
    """ValueError for a mask of another layout, or a cache of a fixed size."""
    mask = arguments.get("attention_mask")
    has_plain_mask = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    # A static cache is made for the caller's tokens, and has no room for the prompt.
    if isinstance(arguments.get(CACHE), StaticCache) or not has_plain_mask:
        raise ValueError(
            "a soft prompt needs one attention mask [batch, kv_len] and a cache that grows: "
            "give neither"
        )


def _counts_cache(arguments: dict[str, Any]) -> bool:
    """Whether mask and positions count the soft prompt that is in a cache.

    Whoever filled the cache may do so; then nothing is left to add. `generate` counts the tokens
    that it was given alone.
    """
    n_cached = n_seen(arguments)
    if not n_cached:
        return False
    kv_len = n_cached + read_by(arguments).shape[1]
    mask = arguments.get("attention_mask")
    if mask is not None:
        return mask.shape[1] == kv_len
    positions = arguments.get("position_ids")
    return positions is None or int(positions.max()) + 1 >= kv_len


def _filled(callers_cache: Cache | None, prefix: Cache) -> Cache:
    """Returns a cache with the prefix in it: the caller's, if there is one."""
    if callers_cache is None:
        return prefix
    # In general a layer may hold something else than keys and values; peft's hold these.
    layers: Any = prefix.layers
    for place, layer in enumerate(layers):
        callers_cache.update(layer.keys, layer.values, place)
    return callers_cache
