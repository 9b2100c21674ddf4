"""Effect: what routing changes on a prompt, from a plain and a routed pass side by side.

Both passes run the model's own `eager` kernel, the one that hands out its attention weights. In the first routed
layer all attention that moves is the bias's doing; later layers also read hidden states that routing has changed.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.decoder.batches import pad
from icrouting.decoder.families import attention_of, base_of, device_of
from icrouting.decoder.passes import next_token_logits
from icrouting.routing.attach import routed_kernel
from icrouting.routing.router import Routing

# A routing far too weak for bfloat16 still moved the logits of SmolLM2 by 2.4 units of the largest one's last place.
ROUNDING_IN_ULP = 4


@dataclass(frozen=True)
class Passes:
    """A prompt without and with routing, in float32; in pairs the plain one comes first.

    `logits` come after the last token, `attn_weights` are the last token's in the routed `layers`; `mass_moved` is the
    total variation distance between each token's two attention rows, `rounding` what the logits may move by rounding
    alone, in the model's dtype and at their size.
    """

    layers: tuple[int, ...]
    logits: Float[Tensor, "2 vocab"]
    attn_weights: Float[Tensor, "2 n_layers n_heads kv_len"]
    mass_moved: Float[Tensor, "n_layers n_heads q_len"]
    rounding: float

    @property
    def kl(self) -> float:
        """KL(plain || routed) of the next-token distributions, in nats."""
        plain, routed = self.logits.double().log_softmax(-1)
        return float((plain.exp() * (plain - routed)).sum().clamp_min(0))

    @property
    def is_nothing(self) -> bool:
        """Whether no logit moved by more than rounding."""
        return float(self.logits.diff(dim=0).abs().max()) <= self.rounding


@torch.no_grad()
def run_both(model: PreTrainedModel, tokens: list[int], layers: tuple[int, ...]) -> Passes:
    """Returns an attached model's two passes over a prompt; its attention implementation is put back."""
    base, found = base_of(model), base_of(model).config._attn_implementation
    assert found is not None, "transformers gives every loaded model an attention implementation"
    batch, kept = pad([tokens], 0).to(device_of(model)), []
    with ExitStack() as stack:
        # Not `output_attentions`: that keeps every layer's weights, and leaves hooks of transformers on the model.
        for layer in layers:
            hook = attention_of(model, layer).register_forward_hook(
                lambda *call: kept.append(call[-1][1][0].cpu())
            )
            stack.callback(hook.remove)
        stack.callback(base.set_attn_implementation, found)
        base.set_attn_implementation(
            "eager"
        )  # past the function that `attached` put there: a plain pass
        plain = next_token_logits(model, batch)
        stack.enter_context(routed_kernel(base))
        logits = torch.cat([plain, next_token_logits(model, batch)]).cpu()
    attn_weights = torch.stack(kept).float().unflatten(0, (2, len(layers)))
    mass_moved = attn_weights.diff(dim=0)[0].abs().sum(-1) / 2
    rounding = ROUNDING_IN_ULP * torch.finfo(base.dtype).eps * float(logits.abs().max())
    return Passes(layers, logits, attn_weights[..., -1, :].clone(), mass_moved, rounding)


def describe(passes: Sequence[Passes], routing: Routing) -> str:
    """Returns one line of numbers: means over prompts, their next-token logits and their last token's attention."""
    n, layers, moved = (
        len(passes),
        passes[0].layers,
        torch.cat([each.logits.diff(dim=0).abs() for each in passes]),
    )
    n_changed = sum(len(set(each.logits.argmax(-1).tolist())) > 1 for each in passes)
    mass = 100 * sum(float(each.mass_moved[..., -1].mean()) for each in passes) / n
    return (
        f"effect on {n} prompt{'s' * (n > 1)}: logits moved {moved.mean():.3g} (largest {moved.max():.3g}), "
        f"KL {sum(each.kl for each in passes) / n:.3g} nats, top token changed in {n_changed} of {n}, attention moved "
        f"{mass:.3g} % (layers {layers[0]} to {layers[-1]}), gates {routing.head_gates.mean():.2g}, "
        f"|alpha| {routing.routing_vector.abs().mean():.2g}"
    )


def warn_if_nothing(passes: Sequence[Passes]) -> None:
    """Warns the caller's caller when no prompt's logits moved by more than rounding."""
    if all(each.is_nothing for each in passes):
        warnings.warn(
            "routing does numerically nothing here: no next-token logit moved by more than the model's dtype rounds "
            f"({max(each.rounding for each in passes):.2g}); is `strength` 0, the router untrained, or its change too "
            "small for the dtype? raise `strength`, fit for longer, or load the model in float32",
            stacklevel=3,
        )
