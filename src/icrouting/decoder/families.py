"""Model families: where each one's queries and keys can be read before rotary embedding.

One row a family and nothing family-specific elsewhere. The rows were checked against transformers
5.5 to 5.24. Queries and keys are taken after a family's own query/key norm, since the normed ones
enter the attention logits (paper silent), and before rotary embedding, as in the paper's
algorithm 2.
"""

import threading
import weakref
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

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
from icrouting.decoder.wiring import agrees, has_sites

# What transformers calls a cache, in calls and in outputs, since 5.24 and before.
if "cache" in BaseModelOutputWithPast.__dataclass_fields__:
    CACHE = "cache"
else:
    CACHE = "past_key_values"

# Keyed by stack, since hooks hold a model alone and ask for its family in every forward pass.
_confirmed: weakref.WeakKeyDictionary[nn.Module, Family] = weakref.WeakKeyDictionary()
_checking = threading.RLock()

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
    """Returns the transformers model itself, also inside a peft wrapper.

    Raises:
        TypeError: there is none.
        ValueError: a peft wrapper changes the prompt.
    """
    if hasattr(model, "prompt_encoder"):
        raise ValueError(
            f"{type(model).__name__} puts tokens of its own before the prompt: "
            "expected a LoRA or none"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"expected a transformers model, got {type(model).__name__}")


def stack_of(model: nn.Module) -> PreTrainedModel:
    """Returns the stack of layers under the vocabulary head.

    Its forward builds masks and rotary tables.
    """
    base = base_of(model)
    stack = base.get_decoder()
    if not isinstance(stack, PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} cannot be routed: transformers names no decoder inside it"
        )
    return stack


def family_of(model: nn.Module) -> Family:
    """Returns the family row of a model, whose wiring is checked once per model object.

    A model type without a row of its own is tried with every row there is.

    Raises:
        ValueError: the model is no decoder, or no row tells where its queries and keys are.
    """
    base = base_of(model)
    stack = stack_of(model)
    if stack not in _confirmed:
        # One check at a time: it exchanges the attention function of the model.
        with _checking:
            if stack not in _confirmed:
                _confirmed[stack] = _confirmed_family(base, stack)
    return _confirmed[stack]


def _confirmed_family(base: PreTrainedModel, stack: PreTrainedModel) -> Family:
    model_type = stack.config.model_type
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"{model_type!r} models cannot be routed: expected a decoder, got an encoder with one"
        )
    if model_type in FAMILIES:
        rows = [FAMILIES[model_type]]
    else:
        # Families share rows; each is tried once.
        rows = list(dict.fromkeys(FAMILIES.values()))
    for row in rows:
        if has_sites(stack, row) and agrees(base, stack, row, dims_of(base), device_of(stack)):
            return row
    places = ", or ".join(dict.fromkeys(map(str, rows)))
    raise ValueError(
        f"the attention of {model_type!r} models cannot be routed: looked for queries and keys "
        f"that reach the attention function, up to rotary embedding, from {places} "
        "(docs/families.md says how to add a family)"
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder's layers, in order."""
    return getattr(stack_of(model), family_of(model).layers)


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """Returns the attention module of one layer."""
    return getattr(layers_of(model)[layer], family_of(model).attention)


def branches_of(model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module]:
    """Returns the two modules of a layer whose outputs are added to the residual stream.

    The attention branch comes before the MLP's.
    """
    family = family_of(model)
    block = layers_of(model)[layer]
    model_type = stack_of(model).config.model_type
    # The wiring check looks at queries and keys alone, so a borrowed row may be wrong here.
    if model_type not in FAMILIES:
        raise ValueError(
            f"the branches of {model_type!r} models are not known: add a row to families.FAMILIES"
        )
    attention_branch = getattr(block, family.attention_branch or family.attention)
    mlp_branch = getattr(block, family.mlp_branch)
    return attention_branch, mlp_branch


def all_branches_of(model: nn.Module) -> list[nn.Module]:
    """Returns the branches of every layer in order, each layer's attention before its MLP."""
    branches: list[nn.Module] = []
    for layer in range(len(layers_of(model))):
        branches.extend(branches_of(model, layer))
    return branches


def output_of(model: nn.Module, layer: int) -> nn.Module:
    """Returns the projection of one layer's attention that mixes what its heads give.

    It takes [batch, q_len, n_heads * head_dim].
    """
    name = family_of(model).output
    attention = attention_of(model, layer)
    model_type = stack_of(model).config.model_type
    # As for the branches: only a row of its own vouches for more than queries and keys.
    if model_type not in FAMILIES or not hasattr(attention, name):
        raise ValueError(
            f"the output projection of {model_type!r} models is not known (looked for {name!r}): "
            "name it in a row of families.FAMILIES"
        )
    return getattr(attention, name)


def dims_of(model: nn.Module) -> Dims:
    """Returns the sizes of a decoder, from its config."""
    config = stack_of(model).config
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is None:
        raise ValueError(
            f"{config.model_type!r} models cannot be routed: their config names no attention heads"
        )
    # Configs leave out, or set to None, what follows from the other sizes.
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return Dims(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
    )


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter that is not off-loaded."""
    for parameter in module.parameters():
        # Off-loaded parameters are on the meta device, where nothing runs.
        if not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")
