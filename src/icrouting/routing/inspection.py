"""Inspection: what the router did to one prompt, as values, for the terminal and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.decoder.texts import prompts_of, texts_of
from icrouting.routing.effect import Passes, describe, run_both
from icrouting.routing.routed import Routed
from icrouting.routing.router import Routing
from icrouting.runtime.equality import are_equal
from icrouting.runtime.pages import points, render
from icrouting.tasks.chat import Messages

N_TOP = 10
_FILTERS = {"points": points}


@dataclass(frozen=True)
class Candidate:
    """A possible next token, without and with routing."""

    text: str
    logits: tuple[float, float]
    probabilities: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a router did to one prompt.

    Attributes:
        strength: factor on the routing vector.
        tokens: the prompt's tokens as text.
        passes: its two passes.
        routing: what the router decided, with its strength; one row.
        options: answers with their probabilities among them; empty where none were asked for.
        top_tokens: the likeliest next tokens, by the larger of their two probabilities.
    """

    strength: float
    tokens: list[str]
    passes: Passes
    routing: Routing
    options: list[Candidate]
    top_tokens: list[Candidate]

    def __eq__(self, other: object) -> bool:
        return are_equal(self, other)

    @property
    def gained(self) -> Float[Tensor, "kv_len"]:
        """The last token's attention to each token, routed minus plain, mean over routed heads."""
        plain, routed = self.passes.attn_weights
        return (routed - plain).mean((0, 1))

    @property
    def line(self) -> str:
        """The effect in one line."""
        return describe([self.passes], self.routing)


def inspect_prompt(
    routed: Routed, prompt: str | Messages, options: Sequence[str] | None = None
) -> Inspection:
    """Returns what a router does to one prompt, inside `InContextRouter.attached`.

    Args:
        routed: the attached model.
        prompt: ends right before the space and the answer ("Sentiment:"), or is a conversation.
        options: two answers to choose from or more; None looks at the likeliest tokens alone.
    """
    decoder = routed.reader.decoder
    # Everything that a user may get wrong is found out before the model runs.
    if options is not None and len(texts_of(options, "options")) < 2:
        raise ValueError(f"expected at least two options or none, got {list(options)}")
    (whole_prompt,) = prompts_of([prompt], decoder.tokenizer)
    (token_ids,) = decoder.tokenize([whole_prompt.text])
    options_ids: list[int] = []
    if options:
        text = whole_prompt.text
        options_ids = option_ids(decoder.tokenizer, text, options, whole_prompt.joint)
    decoder.check_known([options_ids])
    passes = run_both(decoder.model, token_ids, routed.layers)
    routing = routed.routing([prompt])
    probabilities = passes.logits.softmax(-1)
    # A token counts that is likely on either side, so that what routing silenced is shown too.
    n_top = min(N_TOP, probabilities.shape[-1])
    top_ids = probabilities.amax(0).topk(n_top).indices.tolist()
    options_logits = passes.logits[:, options_ids]
    return Inspection(
        strength=routed.strength,
        tokens=_texts(decoder, token_ids),
        passes=passes,
        routing=routing,
        options=_candidates(options or [], options_logits, options_logits.softmax(-1)),
        top_tokens=_candidates(
            _texts(decoder, top_ids), passes.logits[:, top_ids], probabilities[:, top_ids]
        ),
    )


def _texts(decoder: Decoder, token_ids: Sequence[int]) -> list[str]:
    return [str(decoder.tokenizer.decode([token])) for token in token_ids]


def _candidates(
    texts: Sequence[str], logits: Float[Tensor, "2 n"], probabilities: Float[Tensor, "2 n"]
) -> list[Candidate]:
    candidates = []
    for place, text in enumerate(texts):
        plain_logit, routed_logit = logits[:, place].tolist()
        plain_share, routed_share = probabilities[:, place].tolist()
        candidates.append(Candidate(text, (plain_logit, routed_logit), (plain_share, routed_share)))
    return candidates


def html(seen: Inspection, about: str) -> str:
    """Returns the page: numbers and pictures, no scripts, nothing fetched.

    `about` names model and router.
    """
    return render(
        "routing/templates/inspect.html.j2", _FILTERS, seen=seen, about=about, quoted=repr
    )


def text(seen: Inspection) -> str:
    """Returns the tables that a terminal shows."""
    return render("routing/templates/inspect.txt.j2", _FILTERS, seen=seen, quoted=repr)
