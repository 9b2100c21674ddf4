"""The model "icr" of lm-evaluation-harness: any of its tasks under routing.

The harness asks how likely continuations of a context are. Routing must be decided by the context
alone, since an option's text in the router would leak the answer. So contexts run first, routed by
themselves, and the cache that they fill keeps their routing for the continuations.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from icrouting.decoder.batches import pad
from icrouting.decoder.families import CACHE
from icrouting.decoder.loading import folder_of
from icrouting.decoder.passes import last_position_only
from icrouting.icr import InContextRouter

try:
    # By name: the harness is no requirement, and its own types would be unknown where it is
    # missing.
    registry = import_module("lm_eval.api.registry")
    huggingface = import_module("lm_eval.models.huggingface")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; it comes with pip install 'icrouting[lm-eval]'", name=error.name
    ) from error

# The context and the continuation as texts, None where the harness gives tokens alone; then their
# tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A continuation's log-likelihood, and whether it is the greedy one.
Answer = tuple[float, bool]


class RoutedLM(huggingface.HFLM):
    """The harness's own "hf" model, routed; a subclass with open settings, as the harness asks.

    Args:
        pretrained: hub id, local folder, `.gguf` file or "pinned:smollm2-135m"; by default the one
            that the router was fitted on.
        icr: folder or hub id of a router fitted on it.
        strength: factor on the routing; 0 is "hf" itself.
        settings: what "hf" takes; `batch_size` counts contexts, `logits_cache` has no effect.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        icr: str | None = None,
        strength: int | float = 1.0,
        **settings: Any,
    ):
        if icr is None:
            raise ValueError("expected icr=FOLDER, a router's folder or hub id, got none")
        router = InContextRouter.from_pretrained(icr)
        pretrained = pretrained or router.base_model
        self._strength = float(strength)
        # "hf" rounds log-likelihoods to the model's dtype; in bfloat16 options would tie.
        super().__init__(folder_of(pretrained), **{"softmax_dtype": "float32", **settings})
        # The paper's method, which has no gate: the harness measures what routing does.
        self._attached = partial(
            router.attached, self.model, self.tokenizer, strength=self._strength, gate=False
        )
        # A router of another model is refused before any work.
        with self._attached():
            pass

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of a context and of what follows it, parted where they meet.

        The harness moves white space at a context's end over to what follows. A line break, in
        which chat templates end, belongs to the prompt that is routed.
        """
        is_opened = context.endswith("\n") and not continuation[:1].isspace()
        if self._strength == 0 or not is_opened:
            return super()._encode_pair(context, continuation)
        context_tokens = self.tok_encode(context)
        tokens = self.tok_encode(context + continuation)
        n_context = len(context_tokens)
        # Where the two merge in tokens, the harness parts them before the line break.
        if tokens[:n_context] != context_tokens:
            return super()._encode_pair(context, continuation)
        return context_tokens, tokens[n_context:]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Returns generated texts, each routed by its prompt."""
        with self._attached():
            return super().generate_until(requests, disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if self._strength == 0:
            plain_answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            for (texts, _, _), answer in zip(requests, plain_answers, strict=True):
                _check_finite(texts, answer)
            return plain_answers
        if not all(texts and texts[0].strip() for texts, _, _ in requests):
            raise ValueError(
                "a likelihood without a context has no prompt to be routed by: "
                "ask for it with strength=0"
            )
        rows_by_context = _rows_by_context(requests)
        answers: dict[int, Answer] = {}
        half = self.mixed_precision_dtype
        with self._attached(), torch.autocast(self.device.type, half, enabled=half is not None):
            n_contexts = self.batch_size
            if n_contexts == "auto":
                longest = requests[rows_by_context[0][0]]
                n_contexts = self._detect_batch_size([longest])
            starts = range(0, len(rows_by_context), n_contexts)
            for start in tqdm(starts, disable=disable_tqdm, desc="log-likelihoods"):
                batch = rows_by_context[start : start + n_contexts]
                groups = [[requests[row] for row in rows] for rows in batch]
                answers |= zip(chain(*batch), self._answers(groups), strict=True)
        return [answers[row] for row in range(len(requests))]

    def _answers(self, groups: Sequence[list[Request]]) -> Iterator[Answer]:
        """Yields every continuation's answer; the requests of a group share their context."""
        contexts = []
        for group in groups:
            tokens = _cut_context(group, self.max_length)
            contexts.append(torch.tensor(tokens, device=self.device))
        logits = _logits_at_continuations(self.model, contexts, groups)
        for group_logits, group in zip(logits, groups, strict=True):
            # Rows beyond a group's own continuations are repetitions.
            for row_logits, (texts, _, tokens) in zip(group_logits, group, strict=False):
                answer = _judged(row_logits[: len(tokens)], tokens, self.softmax_dtype)
                _check_finite(texts, answer)
                self.cache_hook.add_partial("loglikelihood", texts, answer)
                yield answer


def _rows_by_context(requests: Sequence[Request]) -> list[list[int]]:
    """Returns the rows of requests that share a context, for each of them, the longest first."""
    rows_by_context: dict[tuple[int, ...], list[int]] = {}
    for row, (_, context, _) in enumerate(requests):
        rows_by_context.setdefault(tuple(context), []).append(row)
    longest_first = sorted(rows_by_context, key=len, reverse=True)
    return [rows_by_context[context] for context in longest_first]


def _cut_context(group: Sequence[Request], max_length: int) -> list[int]:
    """Returns the context of a group, cut on the left where continuations leave it too little room.

    It is cut alike for all of them, so that one routing judges them.
    """
    longest = max(len(continuation) for _, _, continuation in group)
    # The last token of a continuation is not read.
    n_tokens = max_length + 1 - longest
    assert n_tokens > 0, f"a continuation is longer than the model's context of {max_length} tokens"
    _, context, _ = group[0]
    return context[-n_tokens:]


def _logits_at_continuations(
    model: PreTrainedModel, contexts: list[Tensor], groups: Sequence[list[Request]]
) -> Tensor:
    """Returns the logits for every token of continuations, [n_groups, n_rows, q_len, vocab].

    A group with fewer continuations than others repeats them.
    """
    device = contexts[0].device
    n_rows = max(map(len, groups))
    # Padded on the left, so that continuations follow without a gap, as sliding windows need.
    input_ids = pad_sequence(contexts, True, 0, "left")
    is_real = pad_sequence([torch.ones_like(context) for context in contexts], True, 0, "left")
    positions = (is_real.cumsum(1) - 1).clamp_min(0)
    with last_position_only(model, is_real.bool()):
        output = model(
            input_ids=input_ids, attention_mask=is_real, position_ids=positions, use_cache=True
        )
    logits = output.logits[:, None, None].expand(-1, n_rows, -1, -1)
    cache = output[CACHE]
    read_tokens: list[list[int]] = []
    for group in groups:
        repeated = (group * n_rows)[:n_rows]
        # What follows the last token is not asked for.
        read_tokens += [continuation[:-1] for _, _, continuation in repeated]
    if not any(read_tokens):
        return logits
    tails = pad(read_tokens, 0).to(device)
    is_real = torch.cat([is_real.repeat_interleave(n_rows, 0), tails.attention_mask], 1)
    positions = (is_real.cumsum(1) - 1)[:, input_ids.shape[1] :]
    cache.batch_repeat_interleave(n_rows)
    output = model(
        tails.input_ids, attention_mask=is_real, position_ids=positions, **{CACHE: cache}
    )
    return torch.cat([logits, output.logits.unflatten(0, (-1, n_rows))], 2)


def _judged(logits: Tensor, tokens: list[int], dtype: torch.dtype | None) -> Answer:
    """Returns the answer for a continuation, given the logits for each of its tokens."""
    continuation = torch.tensor(tokens, device=logits.device)
    logprobs = logits.log_softmax(-1, dtype)
    likelihood = logprobs.gather(1, continuation[:, None]).sum()
    is_greedy = (logprobs.argmax(1) == continuation).all()
    return float(likelihood), bool(is_greedy)


def _check_finite(texts: tuple[str, str] | None, answer: Answer) -> None:
    """ValueError for a likelihood that is not finite; the harness would compare it."""
    likelihood, _ = answer
    if not math.isfinite(likelihood):
        context = texts[0] if texts else ""
        raise ValueError(
            f"the log-likelihood behind a context is {likelihood} (it ends {context[-60:]!r}): "
            "load the model in float32 or bfloat16 (dtype)"
        )


def main() -> None:
    """Runs the harness's own command line.

    Up to 0.4.13 it finds no models by entry points, so "icr" is named to it.
    """
    registry.register_model("icr")(RoutedLM)
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
