"""Kernels: a model's attention function, exchanged for another."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def kernel_of(name: str, module: nn.Module) -> Callable:
    """Returns a kernel; each family has an eager one of its own, in its modelling file."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    modelling_file = sys.modules[type(module).__module__]
    kernel = getattr(modelling_file, "eager_attention_forward", None)
    assert kernel is not None, f"{type(module).__name__} has no eager attention function"
    return kernel


@contextmanager
def attention_function(
    model: PreTrainedModel, name: str, function: Callable, masks: str
) -> Iterator[None]:
    """Inside, the model's attention modules call `function`.

    Args:
        model: the whole model.
        name: what transformers knows the function by, for all models of this process.
        function: takes and returns what transformers' own attention functions do.
        masks: the kernel whose masks it is handed, such as "sdpa".

    Raises:
        ValueError: the model does not let its attention function be changed.
    """
    original = model.config._attn_implementation
    assert original is not None, "transformers gives every loaded model an attention implementation"
    # A model inside it, of text or of images, may have another.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    implementations = [config._attn_implementation for config in configs]
    AttentionInterface.register(name, function)
    # Without a mask function of the same name transformers would drop the mask silently.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    try:
        model.set_attn_implementation(name)
        # Some models ignore the call, without an error.
        if model.config._attn_implementation != name:
            raise ValueError(
                f"{type(model).__name__} does not let its attention implementation be changed, "
                "so it cannot be routed"
            )
        yield
    finally:
        model.set_attn_implementation(original)
        # What a config is given goes to those inside it, too: so the outer ones come first.
        for config, implementation in zip(configs, implementations, strict=True):
            if config._attn_implementation != implementation:
                config._attn_implementation = implementation
