"""Pooling: which tokens of a prompt count in what is captured of it (the paper's ablations).

    last-n      the mean over the last n tokens, or over all where there are fewer
    rollout     R = A_L ... A_1,  A_l = (mean over heads of layer l's attention + I) / 2

with the weights of R's row of the last token (Abnar and Zuidema 2020). The paper is silent on which
layers count: these are all layers of the model, so that a token has one weight in every layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from icrouting.config import Pooling
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of, base_of

# From a batch's mask, after its pass, the weight of every token; None for the last token's alone.
WeightsOf = Callable[[Bool[Tensor, "batch q_len"]], Float[Tensor, "batch q_len"] | None]


@contextmanager
def pooled(decoder: Decoder, pooling: Pooling) -> Iterator[WeightsOf]:
    """Inside, what is yielded gives the weights of the tokens of the batch that was run last.

    Each row's sum to 1. Batches are padded on the right.
    """
    if pooling == "last":
        yield lambda mask: None
    elif pooling == "rollout":
        with _rolled_out(decoder) as rollout:
            yield rollout.weights
    else:
        n_tokens = int(pooling.removeprefix("last-"))
        yield lambda mask: last_weights(mask, n_tokens)


def last_weights(mask: Bool[Tensor, "batch q_len"], n_tokens: int) -> Float[Tensor, "batch q_len"]:
    """Returns equal weights for the last tokens of each row."""
    n_behind = mask.sum(1, keepdim=True) - torch.arange(mask.shape[1])
    is_counted = (mask & (n_behind <= n_tokens)).float()
    return is_counted / is_counted.sum(1, keepdim=True)


class _Rollout:
    """The product of attention over the layers of a pass, as far as it has come."""

    def __init__(self):
        self._product: Tensor | None = None

    def add(self, attention: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Takes up the next layer's attention weights, as a forward hook of its module."""
        mean = output[1].float().mean(1)
        own = torch.eye(mean.shape[-1], device=mean.device)
        # Rows with a sink sum to less than one.
        step = mean / mean.sum(-1, keepdim=True) + own
        product = own.expand_as(mean) if self._product is None else self._product
        self._product = step / 2 @ product.to(mean.device)

    def weights(self, mask: Bool[Tensor, "batch q_len"]) -> Float[Tensor, "batch q_len"]:
        """Returns the weights of each row's tokens in its last one, and begins anew."""
        assert self._product is not None, "a pass was run before"
        product = self._product.cpu()
        self._product = None
        rows = torch.arange(len(mask))
        weights = product[rows, mask.sum(1) - 1] * mask
        return weights / weights.sum(1, keepdim=True)


@contextmanager
def _rolled_out(decoder: Decoder) -> Iterator[_Rollout]:
    """Inside, passes run on the `eager` kernel, the one that hands out its attention weights."""
    base = base_of(decoder.model)
    implementation = base.config._attn_implementation
    assert implementation is not None, "transformers gives every loaded model an implementation"
    rollout = _Rollout()
    with ExitStack() as leaving:
        # Not `output_attentions`: that keeps every layer's weights.
        for layer in range(decoder.dims.n_layers):
            attention = attention_of(decoder.model, layer)
            leaving.enter_context(attention.register_forward_hook(rollout.add))
        leaving.callback(base.set_attn_implementation, implementation)
        base.set_attn_implementation("eager")
        yield rollout
