"""What `icr calibrate` does, once its arguments are parsed."""

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from icrouting.cli.loading import base_of_router, console, load
from icrouting.cli.predict import router_spec
from icrouting.decoder.backbone import Backbone
from icrouting.icr import InContextRouter
from icrouting.routing.ownership import CONFIG, check_place
from icrouting.routing.priors import Way
from icrouting.routing.shipped import TaskCalibration, check_name, joined
from icrouting.runtime.progress import spinner
from icrouting.tasks.rows import unlabelled_fields
from icrouting.tasks.streams import Table

# Rows that a long file gives are drawn, since a file may be sorted by its labels.
SEED = 0
# Options whose lean a line shows.
MOST_SHOWN = 8


def calibrate(
    router: str,
    rows: Path,
    out: Path | None,
    model: Backbone,
    task: str | None,
    *,
    way: Way,
    most: int,
) -> None:
    """Saves a router with a task's priors, estimated from rows without labels."""
    if most < 2:
        raise ValueError(f"--most must be 2 or more rows, got {most}")
    icr = InContextRouter.from_pretrained(router)
    if out is None and not Path(router).is_dir():
        raise ValueError(f"{router} is on the hub: say with --out where to save it with its priors")
    if icr.gate is None:
        raise ValueError(
            f"{router} has no gate, so it routes every prompt and leaves none to calibrate: fit "
            "it with a gate, or calibrate the scores yourself by `routed.calibrate`"
        )
    folder = out or Path(router)
    spec = router_spec(task, icr)
    # Before anything is computed: what could not be saved, or asked for, is said.
    check_place(folder)
    check_name(spec, with_priors_in(folder, icr).known_specs)
    with spinner(f"reading {rows}"):
        table = Table(rows, tuple(unlabelled_fields(spec)))
        n_rows, headings = table.survey()
        places = set(np.random.default_rng(SEED).permutation(n_rows)[:most].tolist())
        chosen = [row for place, row in enumerate(table.rows()) if place in places]
    unread = [name for name in headings if name not in table.needed]
    if unread:
        say(f"{rows}: not read, labels among them: {', '.join(unread)}.")
    asked = [table.asked(row) for row in chosen if not row.problem]
    if not asked:
        raise ValueError(
            f"{rows} has no row that can be asked, of {n_rows:,}: give some hundred of the task's"
        )
    base, tokenizer = load(base_of_router(model, icr))
    with icr.attached(base, tokenizer) as routed:
        calibration, predictions = routed.calibrate_task(asked, spec, way=way)
    save(icr, calibration, folder)
    statuses = Counter(each.status.partition(":")[0] for each in predictions)
    listed = ", ".join(f"{status} {count:,}" for status, count in statuses.most_common())
    say(f"{spec.name}: {len(chosen):,} of {n_rows:,} rows ({listed}).")
    for line in leans_of(calibration):
        say(line)
    answered = ["icr", "predict", str(folder), str(rows)]
    answered += ["--task", spec.name, "--out", "answers.csv"]
    say(
        f"{folder}: rows of {spec.name!r} that the gate leaves alone are answered without this "
        f"prior from now on. Next: {shlex.join(answered)}"
    )


def with_priors_in(folder: Path, icr: InContextRouter) -> InContextRouter:
    """Returns a router with the priors, too, that lie in the folder where it is to be saved.

    Raises:
        ValueError: another router lies there.
    """
    if not (folder / CONFIG).exists():
        return icr
    there = InContextRouter.from_pretrained(folder)
    if there.digest() != icr.digest() or there.gate != icr.gate:
        raise ValueError(
            f"{folder} holds another router, {there.digest()}, which would be overwritten: choose "
            "another --out"
        )
    calibrations = icr.calibrations
    for calibration in there.calibrations:
        calibrations = joined(calibrations, calibration)
    return replace(icr, calibrations=calibrations)


def save(icr: InContextRouter, calibration: TaskCalibration, folder: Path) -> None:
    """Saves a router with a task's priors beside those that lie in the folder.

    Another process may have calibrated another task since the router was loaded.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    with lock:
        with_priors_in(folder, icr).with_calibration(calibration).save_pretrained(folder)
    Path(lock.lock_file).unlink(missing_ok=True)


def leans_of(calibration: TaskCalibration) -> list[str]:
    """Returns a line for each list of options: how far the model leans to each of them."""
    lines = []
    for prior in calibration.by_options:
        shares = prior.log_prior.softmax(0).tolist()
        # The largest first, of which a line shows some.
        ordered = sorted(zip(prior.options, shares, strict=True), key=lambda pair: -pair[1])
        leans = [f"{option} {share:.1%}" for option, share in ordered[:MOST_SHOWN]]
        if len(ordered) > MOST_SHOWN:
            leans.append(f"and {len(ordered) - MOST_SHOWN} others")
        even = 1 / len(ordered)
        lines.append(
            f"Over {prior.n_prompts:,} prompts the model leans to {', '.join(leans)} "
            f"(no lean: {even:.1%} each)."
        )
    return lines


def say(text: str) -> None:
    """Prints a line as it stands."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
