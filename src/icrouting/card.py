"""The model card that goes with every saved router."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icrouting.artifact import Description

_CARD = """---
library_name: icrouting
base_model: {base_model}
tags: [in-context-learning, in-context-routing]
---

# In-Context Router for {base_model}

A low-rank bias on the attention logits of the frozen base model (In-Context Routing, arXiv 2509.22854).
It gives zero-shot prompts some of the effect of few-shot prompts, at zero-shot length.

| | |
|---|---|
| base model | {base_model} ({model_type}, fingerprint `{fingerprint}`) |
| routed layers (from 0) | {layers} of {n_layers} |
| directions per layer | {rank}, basis `{basis}` |
| features of the query | `{encoder}`, {n_features} wide |
| source tasks (training rows) | {tasks} |
| training | {n_queries} queries per task, {epochs} epochs, cross-entropy over the {ce_scope}, lr {lr}, seed {seed} |
| fitted with | {versions} |

```python
from icrouting import InContextRouter, load_model

model, tokenizer = load_model("{base_model}")
icr = InContextRouter.from_pretrained("this folder or its hub id")
with icr.attached(model, tokenizer) as routed:
    routed.score(["Review: a joy to watch .\\nSentiment:"], ["negative", "positive"])
```

It fits this base model only; another one, or damaged files, are refused with an error.
"""


def model_card(description: "Description") -> str:
    """Returns the text of a router's README.md."""
    fit = description.fit
    return _CARD.format(
        base_model=description.base_model,
        model_type=description.model_type,
        fingerprint=description.fingerprint,
        layers=", ".join(map(str, description.layers)),
        n_layers=description.n_layers,
        rank=fit.rank,
        basis=fit.basis,
        encoder=fit.encoder,
        n_features=description.n_features,
        tasks=", ".join(f"{name} ({n_rows:,})" for name, n_rows in description.tasks.items()),
        n_queries=fit.n_queries,
        epochs=fit.epochs,
        ce_scope=fit.ce_scope,
        lr=fit.lr,
        seed=fit.seed,
        versions=", ".join(f"{name} {number}" for name, number in description.versions.items()),
    )
