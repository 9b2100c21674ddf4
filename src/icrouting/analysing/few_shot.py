"""Few-shot: whether routing does to the next token what demonstrations do.

    KL(few-shot || zero-shot)     what demonstrations change
    KL(few-shot || routed)        what of it routing leaves to be changed

Both over the whole vocabulary and among the options alone. Routing does what demonstrations do as
far as the second is smaller than the first; it may also be larger.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from icrouting.analysing.passes import kl
from icrouting.analysing.study import Study, with_interval
from icrouting.runtime.progress import spinner

SCOPES = ("vocabulary", "options")
PAIRS = (("few-shot", "zero-shot"), ("few-shot", "routed"), ("zero-shot", "routed"))


def few_shot(study: Study) -> dict[str, pd.DataFrame]:
    """Returns three tables, by task, of means over items with 95 % bootstrap intervals.

    "pairs": KL(first || second) in nats and the share of items of one likeliest token (or option)
    for few-shot and zero-shot, few-shot and routed, zero-shot and routed. "accuracies": those of
    the three, as shares. "changes": the cosine of what routing and what demonstrations add to
    log-probabilities, their mean taken out: 1 where both change the same tokens, 0 where they have
    nothing to do with one another.

    Where first tokens do not tell a task's options apart, what is of options is NaN.
    """
    with spinner("few-shot prompts"):
        zero, routed = study.zero_and_routed
        demonstrated = study.few_shot_traces.log_probs
    log_probs = {"zero-shot": zero, "routed": routed, "few-shot": demonstrated}
    pairs = []
    accuracies = []
    changes = []
    for scope in SCOPES:
        seen = {name: _seen(study, values, scope) for name, values in log_probs.items()}
        cosines = [change_cosine(*rows) for rows in zip(*seen.values(), strict=True)]
        for task, groups in study.groups.items():
            line = {"task": task, "scope": scope}
            changes.append(line | with_interval("cosine", _picked(cosines, groups)))
        for first, second in PAIRS:
            both = list(zip(seen[first], seen[second], strict=True))
            divergences = [_kl(one, other) for one, other in both]
            same = [_is_same(one, other) for one, other in both]
            for task, groups in study.groups.items():
                line = {"task": task, "scope": scope, "first": first, "second": second}
                line |= with_interval("kl", _picked(divergences, groups))
                pairs.append(line | with_interval("agreement", _picked(same, groups)))
    for name, values in log_probs.items():
        right = study.is_right(values)
        for task, groups in study.groups.items():
            line = {"task": task, "prompt": name}
            accuracies.append(line | with_interval("accuracy", _picked(right, groups)))
    return {
        "pairs": pd.DataFrame(pairs),
        "changes": pd.DataFrame(changes),
        "accuracies": pd.DataFrame(accuracies),
    }


def _seen(study: Study, log_probs: Tensor, scope: str) -> list[Tensor | None]:
    """The items' log-probabilities over the vocabulary or among their options."""
    return list(log_probs) if scope == "vocabulary" else study.among_options(log_probs)


def _picked(values: Sequence[float] | np.ndarray, groups: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(values)[rows] for rows in groups]


def _kl(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return float("nan")
    return float(kl(one[None], other[None]))


def _is_same(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return float("nan")
    return float(one.argmax() == other.argmax())


def change_cosine(
    plain: Tensor | None, routed: Tensor | None, demonstrated: Tensor | None
) -> float:
    """Returns the cosine of two changes of log-probabilities, NaN where one of them is none."""
    if plain is None or routed is None or demonstrated is None:
        return float("nan")
    by_routing = _centred(routed - plain)
    by_demonstrations = _centred(demonstrated - plain)
    sizes = np.linalg.norm(by_routing) * np.linalg.norm(by_demonstrations)
    return float(by_routing @ by_demonstrations / sizes) if sizes > 0 else float("nan")


def _centred(change: Float[Tensor, "n"]) -> Float[np.ndarray, "n"]:
    # What a model rules out by -inf has no change.
    numbers = np.nan_to_num(change.numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    return numbers - numbers.mean()
