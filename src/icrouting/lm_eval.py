"""The model "icr" of lm-evaluation-harness: any of its tasks under routing.

The harness asks how likely continuations of a context are. Routing must be decided by the context alone, since an
option's text in the router would leak the answer. So contexts run first, routed by themselves, and the cache that
they fill keeps their routing for the continuations.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from icrouting.decoder.batches import pad
from icrouting.decoder.families import CACHE
from icrouting.decoder.loading import folder_of
from icrouting.decoder.passes import last_position_only
from icrouting.icr import InContextRouter

try:
    registry, huggingface = (
        import_module(f"lm_eval.{name}") for name in ("api.registry", "models.huggingface")
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; it comes with pip install 'icrouting[lm-eval]'", name=error.name
    ) from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class RoutedLM(huggingface.HFLM):
    """The harness's own "hf" model, routed; a subclass with open settings, as the harness asks.

    Args:
        pretrained: hub id, local folder, `.gguf` file or "pinned:smollm2-135m".
        icr: folder or hub id of a router fitted on it.
        strength: factor on the routing; 0 is "hf" itself.
        settings: what "hf" takes; `batch_size` counts contexts, `logits_cache` has no effect.
    """

    def __init__(self, pretrained: str, icr: str, strength: int | float = 1.0, **settings: Any):
        router, self._strength = InContextRouter.from_pretrained(icr), float(strength)
        # "hf" rounds log-likelihoods to the model's dtype; in bfloat16 options would tie.
        super().__init__(folder_of(pretrained), **{"softmax_dtype": "float32", **settings})
        self._attached = partial(
            router.attached, self.model, self.tokenizer, strength=self._strength
        )
        with self._attached():  # a router of another model is refused before any work
            pass

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
    ) -> list[tuple[float, bool]]:
        if self._strength == 0:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if any(not (texts and texts[0].strip()) for texts, _, _ in requests):
            raise ValueError(
                "a likelihood without a context has no prompt to be routed by: ask for it with strength=0"
            )
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, (_, context, _) in enumerate(requests):
            rows_of.setdefault(tuple(context), []).append(row)
        groups = sorted(rows_of.values(), key=lambda rows: -len(requests[rows[0]][1]))
        answers: dict[int, tuple[float, bool]] = {}
        half = self.mixed_precision_dtype
        with self._attached(), torch.autocast(self.device.type, half, enabled=half is not None):
            size = (
                self._detect_batch_size([requests[groups[0][0]]])
                if self.batch_size == "auto"
                else self.batch_size
            )
            for start in trange(0, len(groups), size, disable=disable_tqdm, desc="log-likelihoods"):
                batch = groups[start : start + size]
                found = self._answers([[requests[row] for row in rows] for rows in batch])
                answers |= zip(chain(*batch), found, strict=True)
        return [answers[row] for row in range(len(requests))]

    def _answers(self, groups: Sequence[list[Request]]) -> Iterator[tuple[float, bool]]:
        """Yields every continuation's log-likelihood, and whether it is greedy; a group shares its context."""
        contexts, widest = [], max(map(len, groups))
        for group in (
            groups
        ):  # cut on the left, alike for all continuations, so that one routing judges them
            room = self.max_length + 1 - max(len(tokens) for _, _, tokens in group)
            assert room > 0, (
                f"a continuation is longer than the model's context of {self.max_length} tokens"
            )
            contexts.append(torch.tensor(group[0][1][-room:], device=self.device))
        # Padded on the left, so that continuations follow without a gap, as sliding windows need.
        input_ids = pad_sequence(contexts, True, 0, "left")
        mask = pad_sequence([torch.ones_like(context) for context in contexts], True, 0, "left")
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with last_position_only(self.model, mask.bool()):
            output = self.model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True
            )
        logits, cache = output.logits[:, None, None].expand(-1, widest, -1, -1), output[CACHE]
        # What follows the last token is not asked for. A context with fewer continuations repeats them.
        fed = [tokens[:-1] for group in groups for _, _, tokens in (group * widest)[:widest]]
        if any(fed):
            tails = pad(fed, 0).to(self.device)
            mask = torch.cat([mask.repeat_interleave(widest, 0), tails.attention_mask], 1)
            positions = (mask.cumsum(1) - 1)[:, input_ids.shape[1] :]
            cache.batch_repeat_interleave(widest)
            output = self.model(
                tails.input_ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}
            )
            logits = torch.cat([logits, output.logits.unflatten(0, (-1, widest))], 2)
        for of_group, group in zip(logits, groups, strict=True):
            for of_row, (texts, _, tokens) in zip(of_group, group, strict=False):
                drawn = torch.tensor(tokens, device=self.device)
                logprobs = of_row[: len(tokens)].log_softmax(-1, self.softmax_dtype)
                answer = (
                    float(logprobs.gather(1, drawn[:, None]).sum()),
                    bool((logprobs.argmax(1) == drawn).all()),
                )
                self.cache_hook.add_partial("loglikelihood", texts, answer)
                yield answer


def main() -> None:
    """Runs the harness's own command line; up to 0.4.13 it finds no models by entry points, so "icr" is named to it."""
    registry.register_model("icr")(RoutedLM)
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
