"""Effect: what routing changes on a prompt, from a plain and a routed pass side by side.

Both passes run the model's own `eager` kernel, the one that hands out its attention weights. In the
first routed layer all attention that moves is the bias's doing; later layers also read hidden
states that routing has changed.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.batches import pad
from icrouting.decoder.families import attention_of, base_of, device_of
from icrouting.decoder.passes import next_token_logits
from icrouting.routing.attach import attachment_of, routed_kernel
from icrouting.routing.router import Routing
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.equality import are_equal

# A routing far too weak for bfloat16 still moved the logits of SmolLM2 by 2.4 units of the largest
# one's last place.
ROUNDING_IN_ULP = 4


@dataclass(frozen=True, eq=False)
class Passes:
    """A prompt without and with routing, in float32; in pairs the plain one comes first.

    Attributes:
        layers: the routed ones.
        logits: after the prompt's last token.
        attn_weights: the last token's, in the routed layers.
        mass_moved: total variation distance between each token's two attention rows, in [0, 1].
        rounding: what logits may move by rounding alone, in the model's dtype and at their size.
    """

    layers: tuple[int, ...]
    logits: Float[Tensor, "2 vocab"]
    attn_weights: Float[Tensor, "2 n_layers n_heads kv_len"]
    mass_moved: Float[Tensor, "n_layers n_heads q_len"]
    rounding: float

    def __eq__(self, other: object) -> bool:
        return are_equal(self, other)

    @property
    def kl(self) -> float:
        """KL(plain || routed) of the next-token distributions, in nats."""
        plain, routed = self.logits.double().log_softmax(-1)
        return float((plain.exp() * (plain - routed)).sum().clamp_min(0))

    @property
    def logits_moved(self) -> Float[Tensor, "vocab"]:
        """How far each logit moved."""
        plain, routed = self.logits
        return (routed - plain).abs()

    @property
    def is_nothing(self) -> bool:
        """Whether no logit moved by more than rounding."""
        return float(self.logits_moved.max()) <= self.rounding

    @property
    def is_top_changed(self) -> bool:
        """Whether another token is the likeliest."""
        plain, routed = self.logits.argmax(-1).tolist()
        return plain != routed


@usual_defaults()
@torch.no_grad()
def run_both(model: PreTrainedModel, tokens: list[int], layers: tuple[int, ...]) -> Passes:
    """Returns an attached model's two passes over a prompt.

    Its attention implementation is put back. ValueError where logits are not finite.
    """
    base = base_of(model)
    implementation = base.config._attn_implementation
    assert implementation is not None, (
        "transformers gives every loaded model an attention implementation"
    )
    batch = pad([tokens], 0).to(device_of(model))
    weights_by_run: list[Tensor] = []

    # Not `output_attentions`: that keeps every layer's weights, and leaves hooks of transformers on
    # the model.
    def keep(attention: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        attn_weights = output[1]
        weights_by_run.append(attn_weights[0].cpu())

    attachment = attachment_of(model, layers[0])
    with ExitStack() as leaving:
        if attachment is not None:
            leaving.enter_context(attachment.comparing())
        for layer in layers:
            leaving.enter_context(attention_of(model, layer).register_forward_hook(keep))
        leaving.callback(base.set_attn_implementation, implementation)
        # Past the function that `attached` put there: a plain pass.
        base.set_attn_implementation("eager")
        plain_logits = next_token_logits(model, batch)
        leaving.enter_context(routed_kernel(base))
        routed_logits = next_token_logits(model, batch)
    logits = torch.cat([plain_logits, routed_logits]).cpu()
    # A model may mask a token by -inf, which softmax takes.
    if not logits.softmax(-1).isfinite().all():
        raise ValueError(
            f"NaN or infinity in the logits after a prompt of {len(tokens)} tokens: "
            "load the model in float32 or bfloat16"
        )
    attn_weights = torch.stack(weights_by_run).float().unflatten(0, (2, len(layers)))
    plain_weights, routed_weights = attn_weights
    mass_moved = (routed_weights - plain_weights).abs().sum(-1) / 2
    rounding = ROUNDING_IN_ULP * torch.finfo(base.dtype).eps * float(logits.abs().max())
    last_weights = attn_weights[..., -1, :].clone()
    return Passes(layers, logits, last_weights, mass_moved, rounding)


@contextmanager
def untouched(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[None]:
    """Inside, an attached model computes what it does by itself, on the `eager` kernel.

    Passes without a cache alone: one that was filled while it was routed is wider.
    """
    base = base_of(model)
    implementation = base.config._attn_implementation
    assert implementation is not None, (
        "transformers gives every loaded model an attention implementation"
    )
    attachment = attachment_of(model, layers[0])
    with ExitStack() as leaving:
        if attachment is not None:
            leaving.enter_context(attachment.unrouted())
        leaving.callback(base.set_attn_implementation, implementation)
        base.set_attn_implementation("eager")
        yield


def describe(passes: Sequence[Passes], routing: Routing) -> str:
    """Returns one line of numbers: means over prompts.

    They are of the next-token logits and of the last token's attention.
    """
    n = len(passes)
    layers = passes[0].layers
    moved = torch.cat([each.logits_moved for each in passes])
    n_changed = sum(each.is_top_changed for each in passes)
    kl = sum(each.kl for each in passes) / n
    mass = sum(float(each.mass_moved[..., -1].mean()) for each in passes) / n
    plural = "s" if n > 1 else ""
    return (
        f"effect on {n} prompt{plural}: logits moved {moved.mean():.3g} "
        f"(largest {moved.max():.3g}), KL {kl:.3g} nats, "
        f"top token changed in {n_changed} of {n}, "
        f"attention moved {100 * mass:.3g} % (layers {layers[0]} to {layers[-1]}), "
        f"gates {routing.head_gates.mean():.2g}, "
        f"|alpha| {routing.routing_vector.abs().mean():.2g}"
    )


def warn_if_nothing(passes: Sequence[Passes], *, is_left_alone: bool = False) -> None:
    """Warns the caller's caller when no prompt's logits moved by more than rounding.

    Args:
        passes: those of the prompts.
        is_left_alone: whether a gate left all of them to the base model.
    """
    is_nothing = all(each.is_nothing for each in passes)
    if is_nothing and is_left_alone:
        warnings.warn(
            "routing does nothing here: the gate left the base model to answer, as these prompts "
            "are unlike those that the router learned from; attach with gate=False to route them",
            stacklevel=3,
        )
    elif is_nothing:
        rounding = max(each.rounding for each in passes)
        warnings.warn(
            "routing does numerically nothing here: no next-token logit moved by more than the "
            f"model's dtype rounds ({rounding:.2g}); is `strength` 0, the router untrained, or its "
            "change too small for the dtype? raise `strength`, fit for longer, or load the model "
            "in float32",
            stacklevel=3,
        )
