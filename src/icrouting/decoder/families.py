"""Model families: where each one's queries and keys can be read before rotary embedding.

One row a family and nothing family-specific elsewhere. The rows were checked against transformers 5.5 to 5.24.
Queries and keys are taken after a family's own query/key norm, since the normed ones enter the attention
logits (paper silent), and before rotary embedding, as in the paper's algorithm 2.
"""

import weakref
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from icrouting.decoder.probe import agrees, has_sites
from icrouting.decoder.sites import (
    Dims,
    Family,
    Site,
    fused_key,
    fused_query,
    head_major,
    interleaved,
    token_major,
)

# What transformers calls a cache, in calls and in outputs: the first name since 5.24, the second before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

_confirmed: weakref.WeakKeyDictionary[nn.Module, Family] = weakref.WeakKeyDictionary()

_POST_NORMED = Family(
    attention_branch="post_attention_layernorm", mlp_branch="post_feedforward_layernorm"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "granite"), Family()),
    "phi": Family(output="dense"),
    "gemma2": _POST_NORMED,
    "opt": Family(mlp_branch="fc2", output="out_proj"),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe"), Family(Site("q_norm", token_major), Site("k_norm", token_major))
    ),
    "gemma3_text": replace(
        _POST_NORMED, query=Site("q_norm", head_major), key=Site("k_norm", head_major)
    ),
    "olmo2": replace(_POST_NORMED, query=Site("q_norm"), key=Site("k_norm")),
    "phi3": Family(Site("qkv_proj", fused_query), Site("qkv_proj", fused_key)),
    "gpt_neox": Family(
        Site("query_key_value", interleaved(0)),
        Site("query_key_value", interleaved(1)),
        attention="attention",
        output="dense",
    ),
    "gpt2": Family(
        Site("c_attn", fused_query),
        Site("c_attn", fused_key),
        layers="h",
        attention="attn",
        output="c_proj",
    ),
}


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside a peft wrapper."""
    if hasattr(model, "prompt_encoder"):
        raise ValueError(
            f"{type(model).__name__} puts tokens of its own before the prompt: expected a LoRA or none"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"expected a transformers model, got {type(model).__name__}")


def stack_of(model: nn.Module) -> PreTrainedModel:
    """The stack of layers under the vocabulary head; its forward builds masks and rotary tables."""
    decoder = base_of(model).get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{type(base_of(model)).__name__} cannot be routed: transformers names no decoder inside it"
        )
    return decoder


def family_of(model: nn.Module) -> Family:
    """The family row of a model, confirmed by a probe once per model object.

    A model type without a row of its own is tried with every row there is.
    """
    base, decoder = base_of(model), stack_of(model)
    if decoder not in _confirmed:
        model_type = decoder.config.model_type
        if base.config.is_encoder_decoder:
            raise ValueError(
                f"{model_type!r} models cannot be routed: expected a decoder, got an encoder with one"
            )
        rows = (
            [FAMILIES[model_type]]
            if model_type in FAMILIES
            else list(dict.fromkeys(FAMILIES.values()))
        )
        fitting = (
            row
            for row in rows
            if has_sites(decoder, row) and agrees(base, decoder, row, dims_of(model))
        )
        family = next(fitting, None)
        if family is None:
            raise ValueError(
                f"the attention of {model_type!r} models cannot be routed: looked for queries and keys that reach "
                f"the attention function, up to rotary embedding, from {', or '.join(dict.fromkeys(map(str, rows)))} "
                "(docs/families.md says how to add a family)"
            )
        _confirmed[decoder] = family
    return _confirmed[decoder]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, in order."""
    return getattr(stack_of(model), family_of(model).layers)


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """The attention module of one layer."""
    return getattr(layers_of(model)[layer], family_of(model).attention)


def branches_of(model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module]:
    """The modules of one layer whose outputs the attention and the MLP branch add to the residual stream."""
    family, block, model_type = (
        family_of(model),
        layers_of(model)[layer],
        stack_of(model).config.model_type,
    )
    if model_type not in FAMILIES:  # the probe checks queries and keys alone
        raise ValueError(
            f"the branches of {model_type!r} models are not known: add a row to families.FAMILIES"
        )
    return getattr(block, family.attention_branch or family.attention), getattr(
        block, family.mlp_branch
    )


def all_branches_of(model: nn.Module) -> list[nn.Module]:
    """The branches of every layer in order, each layer's attention before its MLP."""
    return [
        branch for layer in range(len(layers_of(model))) for branch in branches_of(model, layer)
    ]


def output_of(model: nn.Module, layer: int) -> nn.Module:
    """The projection of one layer's attention that mixes what its heads give, [batch, q_len, n_heads * head_dim]."""
    name, attention = family_of(model).output, attention_of(model, layer)
    model_type = stack_of(model).config.model_type
    if model_type not in FAMILIES or not hasattr(attention, name):
        raise ValueError(
            f"the output projection of {model_type!r} models is not known (looked for {name!r}): name it in a row of "
            "families.FAMILIES"
        )
    return getattr(attention, name)


def dims_of(model: nn.Module) -> Dims:
    """The sizes of a decoder, from its config."""
    config = stack_of(model).config
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is None:
        raise ValueError(
            f"{config.model_type!r} models cannot be routed: their config names no attention heads"
        )
    return Dims(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
    )


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter that is not off-loaded."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
