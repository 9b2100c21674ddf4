"""A model's logits with and without a routing, and what an attachment must put back."""

import tiny
from icrouting.routing.attach import attach
from icrouting.routing.router import Routing

# fp32 round-off; the untouched Mixtral's own prefill and decoding differ by 1.05e-5 from its one
# pass.
CLOSE = 3e-5
# What a wrong site or a lost routing would change at least.
MATTERS = 0.1


def logits_of(model, inputs):
    """Logits at real tokens only: what a padded position holds is nobody's business."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def routed_logits(model, inputs, pids, routing):
    """Logits at real tokens under a routing."""
    with attach(model, pids) as attachment:
        attachment.routing = routing
        return logits_of(model, inputs)


def no_routing(model, batch):
    """A routing whose gates are all zero."""
    neutral = tiny.routing(model, batch)
    return Routing(neutral.routing_vector, neutral.head_gates * 0)


def state_of(model):
    """What attaching changes of a model: its kernel, its mode and its hooks."""
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ]
    return model.config._attn_implementation, model.training, hooks
