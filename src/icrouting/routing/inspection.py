"""Inspection: what the router did to one prompt, as values, for the terminal and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import by_length, finite_rows, pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import TOKEN_BUDGET, next_token_logits
from icrouting.decoder.scoring import counted_tokens
from icrouting.decoder.texts import prompts_of, texts_of
from icrouting.routing.effect import Passes, describe, run_both, untouched
from icrouting.routing.routed import Routed
from icrouting.routing.router import Routing
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.equality import are_equal
from icrouting.runtime.pages import points, render
from icrouting.tasks.chat import Messages
from icrouting.tasks.task import LabelScoring, check_label_scoring

N_TOP = 10
_FILTERS = {"points": points}


@dataclass(frozen=True)
class Candidate:
    """A possible next token or answer, without and with routing.

    An answer that is scored by all its tokens has their log-probability in the logit's place.
    """

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
        label_scoring: how the options are scored.
    """

    strength: float
    tokens: list[str]
    passes: Passes
    routing: Routing
    options: list[Candidate]
    top_tokens: list[Candidate]
    label_scoring: LabelScoring = "first"

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
    routed: Routed,
    prompt: str | Messages,
    options: Sequence[str] | None = None,
    *,
    label_scoring: LabelScoring = "first",
) -> Inspection:
    """Returns what a router does to one prompt, inside `InContextRouter.attached`.

    Args:
        routed: the attached model.
        prompt: ends right before the space and the answer ("Sentiment:"), or is a conversation.
        options: two answers to choose from or more; None looks at the likeliest tokens alone.
        label_scoring: how they are scored, as `Routed.score` takes it: by the logits of their first
            tokens, or by the log-probabilities of all their tokens.

    Raises:
        ValueError: the prompt or the options do not fit, or what the model gives is not finite.
    """
    check_label_scoring(label_scoring)
    decoder = routed.reader.decoder
    # Everything that a user may get wrong is found out before the model runs.
    if options is not None and len(texts_of(options, "options")) < 2:
        raise ValueError(f"expected at least two options or none, got {list(options)}")
    (whole_prompt,) = prompts_of([prompt], decoder.tokenizer)
    (token_ids,) = decoder.tokenize([whole_prompt.text])
    answers: list[list[int]] = []
    if options:
        answers = counted_tokens(
            decoder.tokenizer, whole_prompt.text, options, label_scoring, whole_prompt.joint
        )
        decoder.check_room(token_ids, answers)
    passes = run_both(decoder.model, token_ids, routed.layers)
    routing = routed.routing([prompt])
    probabilities = passes.logits.softmax(-1)
    # A token counts that is likely on either side, so that what routing silenced is shown too.
    n_top = min(N_TOP, probabilities.shape[-1])
    top_ids = probabilities.amax(0).topk(n_top).indices.tolist()
    if label_scoring == "first" or not options:
        scores = passes.logits[:, [answer[0] for answer in answers]]
    else:
        plain = _plain_sums(routed, token_ids, answers)
        finite_rows(plain.isfinite().all()[None], [whole_prompt.text], "option scores", skip=None)
        if label_scoring == "mean":
            plain /= torch.tensor([len(answer) for answer in answers])
        # Last, so that this prompt is the one that was routed last.
        routed_scores = routed.score([prompt], options, label_scoring=label_scoring)
        scores = torch.cat([plain[None], routed_scores])
    return Inspection(
        strength=routed.strength,
        tokens=_texts(decoder, token_ids),
        passes=passes,
        routing=routing,
        options=_candidates(options or [], scores, scores.softmax(-1)),
        top_tokens=_candidates(
            _texts(decoder, top_ids), passes.logits[:, top_ids], probabilities[:, top_ids]
        ),
        label_scoring=label_scoring,
    )


@usual_defaults()
@torch.no_grad()
def _plain_sums(
    routed: Routed, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> Float[Tensor, "n_answers"]:
    """Returns the summed log-probabilities of answers' tokens by the model itself, in nats.

    Prompt and answer are read anew for each token that is asked for, since a model that is attached
    has no cache of its own.
    """
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, answer in enumerate(answers):
        for n_read, token in enumerate(answer):
            wanted.setdefault((*prompt, *answer[:n_read]), []).append((place, token))
    token_lists = [list(tokens) for tokens in wanted]
    sums = torch.zeros(len(answers))
    decoder = routed.reader.decoder
    with routed.hold.turn(), untouched(decoder.model, routed.layers):
        for rows in by_length(token_lists, decoder.token_budget or TOKEN_BUDGET):
            batch = pad([token_lists[row] for row in rows], decoder.pad_id).to(decoder.device)
            log_probs = next_token_logits(decoder.model, batch).log_softmax(-1).cpu()
            for row, row_log_probs in zip(rows, log_probs, strict=True):
                for place, token in wanted[tuple(token_lists[row])]:
                    sums[place] += row_log_probs[token]
    return sums


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
