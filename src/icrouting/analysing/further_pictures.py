"""What the parts tokens, space and cost look like, with a sentence of figures each."""

from collections.abc import Mapping
from typing import Any

from icrouting.analysing import pictures
from icrouting.analysing.cost import FEW_SHOT, KEPT, ROUTED
from icrouting.analysing.pictures import Marks, Picture, or_dash
from icrouting.analysing.space import ACROSS, READS, WITHIN
from icrouting.runtime.pages import MINUS

# Frames, whose columns no type checker knows.
Tables = Mapping[str, Any]
N_SHOWN = 15
N_COMPARED = 50


def tokens(tables: Tables) -> list[Picture]:
    """Returns the pictures of the tokens that routing raises, and of those few-shot raises."""
    table = tables["tokens"]
    top = {}
    for name in ("routing", "few_shot"):
        ranked = table.sort_values(f"{name}_rank")
        top[name] = ranked[ranked[f"{name}_score"] > 0]
    n_compared = min(N_COMPARED, len(top["routing"]), len(top["few_shot"]))
    first_ids = [set(lines.id.head(n_compared)) for lines in top.values()]
    n_shared = len(first_ids[0] & first_ids[1])
    both = f"Of the {n_compared} highest by routing and by demonstrations, {n_shared} are the same."
    drawn = []
    whose = (("routing", "Routing", "raises"), ("few_shot", "Demonstrations", "raise"))
    for name, who, verb in whose:
        lines = top[name].head(N_SHOWN)
        if lines.empty:
            continue
        series = {}
        for column, title in (("routing_change", "routing"), ("few_shot_change", "few-shot")):
            values = lines[column].tolist()
            series[title] = Marks(values, [0.0] * len(values), values)
        raised = ", ".join(lines.token.head(5))
        drawn.append(
            Picture(
                f"Tokens that {who.lower()} {verb} on every task",
                pictures.dots(lines.token.tolist(), series, "change of the log-probability, nats"),
                f"{who} {verb} most steadily {raised}. {both}",
                "The highest scores first: stability over tasks, share of prompts on which the "
                "token rises, and how many tokens it rises above (ICLness). The marks are mean "
                "changes against zero-shot, over tasks.",
                "tokens",
            )
        )
    return drawn or [_nothing_raised()]


def _nothing_raised() -> Picture:
    return Picture(
        "Tokens that rise on every task",
        pictures.dots(["no token"], {}, "change of the log-probability, nats"),
        "No token rises, by routing or by demonstrations.",
        "An untrained router changes no token.",
        "tokens",
    )


def space(tables: Tables) -> list[Picture]:
    """Returns the pictures of the map of routings and of what a prompt foretells."""
    return [_map(tables["map"]), _prediction(tables["prediction"])]


def _map(table: Any) -> Picture:
    groups = {}
    hollow = []
    for task, lines in table.groupby("task", sort=False):
        is_seen = bool(lines.is_seen.iloc[0])
        name = str(task) if is_seen else f"{task} (unseen)"
        groups[name] = (lines.x.tolist(), lines.y.tolist())
        if not is_seen:
            hollow.append(name)
    shares = 100 * table[["share_1", "share_2"]].iloc[0]
    centres = table.groupby("task", sort=False)[["x", "y"]].mean()
    # Squares about the tasks' own means, of all about the common one.
    own = table[["x", "y"]] - centres.loc[table.task].to_numpy()
    whole = table[["x", "y"]] - table[["x", "y"]].mean()
    total = float((whole**2).sum().sum())
    between = 1 - float((own**2).sum().sum()) / total if total > 0 else float("nan")
    says = f"{or_dash(100 * between, '.0f')} % of what prompts' routings differ by on this map "
    says += "lies between tasks, the rest between prompts of one task."
    return Picture(
        "The space of routings",
        pictures.scatter(
            groups,
            hollow,
            f"first component ({shares.iloc[0]:.0f} % of variance)",
            f"second component ({shares.iloc[1]:.0f} %)",
        ),
        says,
        "Each mark is a test prompt, by its routing vector and head gates. Hollow: a task that the "
        "router was not fitted on. Marks that lie together are routed alike.",
        "map",
    )


def _prediction(table: Any) -> Picture:
    tasks = list(table.task.unique())
    series = {}
    best = []
    for held_out in (WITHIN, ACROSS):
        for reads, name in READS.items():
            lines = table[(table.held_out == held_out) & (table.reads == reads)].set_index("task")
            values = lines.r2.loc[tasks]
            # Far below 0 is as bad as below it, and would take the picture's whole width.
            shown = values.clip(lower=-1).tolist()
            series[f"{name}, {held_out}"] = Marks(shown, shown, shown)
            best.append((held_out, reads, float(values.mean())))
    figures = {(held_out, reads): value for held_out, reads, value in best}
    means = [or_dash(figures[held_out, "features"]) for held_out in (WITHIN, ACROSS)]
    return Picture(
        "What a prompt foretells of its few-shot trace",
        pictures.dots(tasks, series, f"R² on held-out prompts ({MINUS}1: that or less)"),
        f"From the router's features a few-shot trace's coefficients are predicted with an R² of "
        f"{means[0]} within a task and {means[1]} from other tasks, mean over tasks "
        "(0: no better than the mean; a dash: too few prompts).",
        "Right of the line: the zero-shot prompt tells something of what its few-shot prompt does "
        "along the router's directions. From the other tasks it is about these tasks' mean, so "
        "that telling the task apart counts too. By ridge regression, on few prompts: a low value "
        "may be their number's fault.",
        "prediction",
    )


def cost(tables: Tables) -> list[Picture]:
    """Returns the pictures of FLOP and of numbers kept against demonstrations."""
    table = tables["cost"]
    return [_flop(table), _kept(table)]


def _series(table: Any, column: str, factor: float = 1.0) -> dict:
    series = {}
    for prompt in (ROUTED, FEW_SHOT, KEPT):
        lines = table[table.prompt == prompt]
        values = (factor * lines[column]).tolist()
        n_demos = lines.n_demos.tolist()
        if prompt == ROUTED:
            # It shows none, and costs the same beside any number.
            n_demos = sorted(table.n_demos.unique())
            values = values * len(n_demos)
        series[prompt] = (n_demos, values)
    return series


def _flop(table: Any) -> Picture:
    ours = float(table[table.prompt == ROUTED].flop_ratio.iloc[0])
    ten = table[table.n_demos == 10].set_index("prompt").flop_ratio
    return Picture(
        "Arithmetic for one answer",
        pictures.lines(
            _series(table, "flop_ratio"),
            "demonstrations",
            "FLOP, as a multiple of zero-shot",
            y_log=True,
        ),
        f"Routing takes {ours:.2f} times the arithmetic of zero-shot; ten demonstrations take "
        f"{ten[FEW_SHOT]:.1f} times as much, and {ten[KEPT]:.2f} where their keys and values are "
        "kept.",
        "Computed from the model's sizes and these prompts' lengths, the router's encoder "
        "included; not measured.",
        "cost",
    )


def _kept(table: Any) -> Picture:
    ours = table[table.prompt == ROUTED].iloc[0]
    kept = table[table.prompt == KEPT]
    per_demo = float(kept.kept.iloc[-1] / kept.n_demos.iloc[-1])
    series = _series(table[table.prompt != FEW_SHOT], "kept", 1e-6)
    series.pop(FEW_SHOT)
    series = {"routed: directions": series[ROUTED], KEPT: series[KEPT]}
    n_demos = series[KEPT][0]
    series["routed: directions and router"] = (
        n_demos,
        [1e-6 * float(ours.kept_with_router)] * len(n_demos),
    )
    return Picture(
        "Numbers kept beside the model",
        pictures.lines(series, "demonstrations", "millions of numbers", y_log=True),
        f"The directions are as many numbers as the keys and values of "
        f"{ours.kept / per_demo:.1f} demonstrations; with the router, of "
        f"{ours.kept_with_router / per_demo:.1f}.",
        "A context that is not kept keeps nothing and is computed anew for every prompt. The "
        "paper counts directions alone.",
        "cost",
    )
