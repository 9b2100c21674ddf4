"""Tokens: vocabulary items that become likelier on every task, by routing and by demonstrations.

With d_t(v) the mean over a task's prompts of how much the log-probability of token v rises, over
that of the zero-shot prompt:

    stability(v)   max(0, m) / (m + s)    m and s the mean and the standard deviation of d_t(v)
                                          over tasks; 1 where all tasks raise v alike
    positive(v)    share of prompts on which v rises, mean over tasks
    borda(v)       sum over tasks of the number of tokens that rise less than v
    score(v)       stability * positive * log(1 + borda)

The score is the paper's "ICLness". What its factors are in detail the paper leaves open; these are
our readings. A token that no prompt finds likely says nothing: those whose mean probability stays
below 1e-5 under all three prompts are left out of the tables, not of the ranks.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from icrouting.analysing.study import Study

LEAST_PROBABILITY = 1e-5
N_KEPT = 200


def score(changes: list[Float[Tensor, "_ vocab"]]) -> pd.DataFrame:
    """Returns a line for each token: its change in nats, the score's factors and the score.

    Args:
        changes: of each task, how much log-probabilities rise on its prompts.
    """
    by_task = np.stack([change.mean(0).numpy() for change in changes])
    positive = np.mean([(change > 0).double().mean(0).numpy() for change in changes], axis=0)
    mean = by_task.mean(0)
    spread = by_task.std(0)
    size = np.abs(mean) + spread
    # A token that nothing moves on any task is raised on none.
    stability = np.maximum(mean, 0) / np.where(size > 0, size, 1)
    # Tokens that rise alike have none of each other below them.
    borda = sum(rankdata(task_changes, method="min") - 1 for task_changes in by_task)
    return pd.DataFrame(
        {
            "change": mean,
            "stability": stability,
            "positive": positive,
            "borda": borda,
            "score": stability * positive * np.log1p(borda),
        }
    )


def tokens(study: Study) -> dict[str, pd.DataFrame]:
    """Returns a table of tokens: those with the highest scores by routing or by demonstrations.

    `token` is quoted, with escapes for what is not ASCII. The columns are those of `score`, with
    `routing_` and `few_shot_` before them, and each token's `routing_rank` and `few_shot_rank`
    among those that some prompt finds likely, from 1.
    """
    zero, routed = study.zero_and_routed
    shown = study.few_shot_traces.log_probs
    scores = {}
    for name, log_probs in (("routing", routed), ("few_shot", shown)):
        # What a model rules out by -inf does not change.
        change = torch.nan_to_num(log_probs - zero, nan=0.0, posinf=0.0, neginf=0.0)
        scores[name] = score([change[study.rows_of(task)] for task in study.tasks])
    likeliest = torch.stack([rows.exp().mean(0) for rows in (zero, routed, shown)]).amax(0)
    is_likely = (likeliest >= LEAST_PROBABILITY).numpy()
    # A model may have more outputs than its tokenizer has tokens.
    is_likely &= np.arange(len(is_likely)) < len(study.decoder.tokenizer)
    table: Any = pd.concat([scores[name].add_prefix(f"{name}_") for name in scores], axis=1)[
        is_likely
    ]
    for name in scores:
        ranks = table[f"{name}_score"].rank(ascending=False, method="first")
        table.insert(0, f"{name}_rank", ranks.astype(int))
    is_kept = (table[["routing_rank", "few_shot_rank"]] <= N_KEPT).any(axis=1)
    table = table[is_kept].sort_values("routing_rank")
    words = [ascii(study.decoder.tokenizer.decode([place])) for place in table.index]
    table.insert(0, "token", words)
    table.insert(1, "id", table.index)
    return {"tokens": table.reset_index(drop=True)}
