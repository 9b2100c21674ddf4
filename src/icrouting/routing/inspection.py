"""Inspection: what the router did to one prompt, as values, for the terminal and as a page of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.scoring import option_ids
from icrouting.routing.effect import Passes, describe, run_both
from icrouting.routing.routed import Routed
from icrouting.routing.router import Routing
from icrouting.runtime.pages import points, render

N_TOP = 10
_FILTERS = {"points": points}


@dataclass(frozen=True)
class Candidate:
    """A possible next token, without and with routing."""

    text: str
    logits: tuple[float, float]
    probabilities: tuple[float, float]


@dataclass(frozen=True)
class Inspection:
    """What a router did to one prompt: its tokens as text, its two passes, the decision with its strength, one row.

    The probabilities of `options`, empty where none were asked for, are those among them; `top_tokens` are the
    likeliest next tokens, by the larger of their two probabilities.
    """

    strength: float
    tokens: list[str]
    passes: Passes
    routing: Routing
    options: list[Candidate]
    top_tokens: list[Candidate]

    @property
    def gained(self) -> Float[Tensor, "kv_len"]:
        """The last token's attention to each token, routed minus plain, mean over the routed heads."""
        return self.passes.attn_weights.diff(dim=0)[0].mean((0, 1))

    @property
    def line(self) -> str:
        """The effect in one line."""
        return describe([self.passes], self.routing)


def inspect_prompt(routed: Routed, prompt: str, options: Sequence[str] | None = None) -> Inspection:
    """Returns what a router does to one prompt, inside `InContextRouter.attached`.

    The prompt ends right before the space and the answer ("Sentiment:"). `options` are two answers to choose from or
    more; None looks at the likeliest tokens alone.
    """
    decoder = routed.reader.decoder
    tokenizer = decoder.tokenizer
    if options is not None and len(options) < 2:
        raise ValueError(f"expected at least two options or none, got {list(options)}")
    (token_ids,) = decoder.tokenize([prompt])
    chosen = option_ids(tokenizer, prompt, options) if options else []
    passes = run_both(decoder.model, token_ids, routed.layers)
    routing = routed.routing([prompt])
    probabilities = passes.logits.softmax(-1)
    top = probabilities.amax(0).topk(min(N_TOP, probabilities.shape[-1])).indices.tolist()
    tokens, top_texts = (
        [str(tokenizer.decode([token])) for token in ids] for ids in (token_ids, top)
    )
    likeliest = _candidates(top_texts, passes.logits[:, top], probabilities[:, top])
    among = passes.logits[:, chosen]
    listed = _candidates(options or [], among, among.softmax(-1))
    return Inspection(routed.strength, tokens, passes, routing, listed, likeliest)


def _candidates(
    texts: Sequence[str], logits: Float[Tensor, "2 n"], shares: Float[Tensor, "2 n"]
) -> list[Candidate]:
    pairs = zip(texts, logits.T.tolist(), shares.T.tolist(), strict=True)
    return [
        Candidate(text, (plain, routed), (before, after))
        for text, (plain, routed), (before, after) in pairs
    ]


def html(seen: Inspection, about: str) -> str:
    """Returns the page: numbers and pictures, no scripts, nothing fetched; `about` names model and router."""
    return render(
        "routing/templates/inspect.html.j2", _FILTERS, seen=seen, about=about, quoted=repr
    )


def text(seen: Inspection) -> str:
    """Returns the tables that a terminal shows."""
    return render("routing/templates/inspect.txt.j2", _FILTERS, seen=seen, quoted=repr)
