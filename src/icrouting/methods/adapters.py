"""Adapters: what peft puts into a frozen model or before its prompts, by contexts that leave no trace."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.pytorch_utils import Conv1D

from icrouting.decoder.batches import context_length
from icrouting.decoder.calls import n_seen, read_by
from icrouting.decoder.families import CACHE, device_of, stack_of
from icrouting.decoder.hold import frozen

RANK, DROPOUT = 32, 0.05


def load_peft() -> Any:
    """Returns the package peft; ValueError says how to install it."""
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"LoRA and soft prompts come from peft ({error}): pip install 'icrouting[peft]'"
        ) from error


@contextmanager
def injected(
    base: PreTrainedModel, targets: Sequence[str], alpha: int, adapter: Mapping[str, Tensor] | int
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, peft's LoRA stands around some modules; then these are back in their places.

    `targets` are their full names; the update is alpha / 32 * B A (Hu et al.). `adapter` holds A and B by name, which
    are put in; or it seeds a new A, to be trained with dropout. Yields A and B of every module by peft's names, in
    float32.
    """
    peft, seed = load_peft(), adapter if isinstance(adapter, int) else None
    originals = {name: base.get_submodule(name) for name in targets}
    if any(".lora_" in name for name, _ in base.named_modules()):
        raise ValueError(
            "expected a model without LoRA, got one that has it: merge it first (merge_and_unload)"
        )
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=alpha,
        lora_dropout=DROPOUT if seed is not None else 0.0,
        target_modules=list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in originals.values()),
    )
    with frozen(base):
        try:
            if seed is not None:
                torch.manual_seed(seed)
            with warnings.catch_warnings():  # of tied heads, which merging alone would harm
                warnings.simplefilter("ignore")
                peft.LoraModel(base, config, "default", low_cpu_mem_usage=seed is None)
            ours = {name: weight for name, weight in base.named_parameters() if ".lora_" in name}
            for name, weight in ours.items():
                device = device_of(originals[name.partition(".lora_")[0]])
                kept = weight if isinstance(adapter, int) else adapter[name]
                base.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(
                    kept.detach().float().to(device)
                )
            yield {name: base.get_parameter(name) for name in ours}
        finally:
            for name, module in originals.items():
                base.set_submodule(name, module)
            vars(base).pop("peft_config", None)


@contextmanager
def in_front(
    base: PreTrainedModel, kind: str, prompt: Float[Tensor, "n_virtual width"]
) -> Iterator[nn.Parameter]:
    """Inside, a soft prompt stands before every prompt of a model, whose outputs are those of its own tokens.

    peft makes the embeddings or the cache; its wrapper would answer for the virtual tokens too, and leave the
    model that others hold without them. They stand before padding on the left, as in peft, so a sliding window
    that is shorter than padding and prompt together reaches fewer of them there.

    `kind` is peft's configuration of the soft prompt: embeddings, or keys and values of all layers in peft's order.
    Yields it as a parameter, in float32.
    """
    peft, decoder, n_virtual = load_peft(), stack_of(base), len(prompt)
    n_cut, withheld = [0], dict[str, None]()

    def before(
        module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        withheld.clear()
        keeps = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if kwargs.get(CACHE) is None and not keeps:
            withheld[CACHE] = None  # ours, which the caller must not go on with
        kwargs, n_cut[0] = _with_prompt(base, kwargs, n_virtual, wrapped.get_prompt)
        return (), kwargs

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        own = output[0][:, n_cut[0] :]
        if isinstance(output, tuple):
            return (own, *output[1 + len(withheld) :])
        return type(output)(**{**output, "last_hidden_state": own, **withheld})

    with frozen(base), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft asks transformers by an old name
        width = (
            {"token_dim": prompt.shape[1]} if kind == "PromptTuningConfig" else {}
        )  # OPT's embeddings may be narrow
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=n_virtual, **width)
        wrapped = peft.get_peft_model(base, config)
    weight = wrapped.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    with (
        frozen(base),
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
    ):
        yield weight


def _with_prompt(
    base: PreTrainedModel, kwargs: dict[str, Any], n_virtual: int, make: Callable[[int], Any]
) -> tuple[dict[str, Any], int]:
    """Returns a decoder's arguments with the soft prompt before them, and the number of tokens that this adds."""
    given, seen, cache = read_by(kwargs), n_seen(kwargs), kwargs.get(CACHE)
    n_rows, q_len = given.shape[:2]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(cache, StaticCache) or not (
        mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    ):
        raise ValueError(
            "a soft prompt needs one attention mask [batch, kv_len] and a cache that grows: give neither"
        )
    is_counted = positions is None or int(positions.max()) + 1 >= seen + q_len
    if seen and (is_counted if mask is None else mask.shape[1] == seen + q_len):
        return kwargs, 0  # whoever filled the cache counts what is in it
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(n_rows, n_virtual), mask], 1)
    if positions is not None:
        kwargs["position_ids"] = positions + n_virtual
    if seen:
        return kwargs, 0
    if n_virtual + q_len > (limit := context_length(base) or math.inf):
        raise ValueError(
            f"{q_len} tokens behind {n_virtual} virtual ones exceed the context of {limit}: shorten them"
        )
    prompt = make(n_rows)
    if isinstance(prompt, Cache):
        layers: Any = (
            () if cache is None else prompt.layers
        )  # a cache of the caller's, who may go on with it
        for place, layer in enumerate(layers):
            kwargs[CACHE].update(layer.keys, layer.values, place)
        kwargs[CACHE] = prompt if cache is None else cache
        return kwargs, 0
    if positions is not None:
        first = torch.arange(n_virtual, device=positions.device).expand(n_rows, -1)
        kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"].expand(n_rows, -1)], 1)
    embeds = given if given.is_floating_point() else stack_of(base).get_input_embeddings()(given)
    kwargs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt.to(embeds), embeds], 1)}
    return kwargs, n_virtual
