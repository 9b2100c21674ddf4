"""Shipped calibrations: the priors of whole tasks, which lie in a router's folder beside it."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from icrouting.routing.calibration import DEFAULT_WAY, BatchCalibration
from icrouting.routing.ownership import CALIBRATION, PRIORS
from icrouting.routing.priors import Way, fewest_prompts
from icrouting.routing.sources import Source
from icrouting.runtime.checks import in_words
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.task import TaskSpec

log = logging.getLogger(__name__)
_FORMAT = "1"
_STRICT = ConfigDict(extra="forbid")


def reading_of(spec: TaskSpec) -> str:
    """Returns what identifies how rows become prompts, whatever a task is called."""
    words = sorted((field, sorted(texts.items())) for field, texts in spec.words.items())
    parts = (spec.template, spec.options, words, spec.label_scoring, spec.chat, spec.system)
    return repr(parts)


@dataclass(frozen=True)
class TaskCalibration:
    """The priors of one task: one for each list of options that its rows have.

    Attributes:
        spec: how it reads; a prior says nothing of other templates.
        by_options: the priors.
        made_of: what gave the scores.
    """

    spec: TaskSpec
    by_options: tuple[BatchCalibration, ...]
    made_of: str

    @classmethod
    def of(
        cls,
        spec: TaskSpec,
        scores: Float[Tensor, "n_rows most_options"],
        options: Sequence[Sequence[str]],
        way: Way = DEFAULT_WAY,
        made_of: str = "",
    ) -> "TaskCalibration":
        """Returns the calibration by the scores of some rows, whose options may differ.

        Options that fewer rows have than there are options get no prior.

        Raises:
            ValueError: no list of options has rows enough.
        """
        places_by_options = _places(options)
        calibrations = []
        for row_options, places in places_by_options.items():
            if len(places) >= fewest_prompts(len(row_options)):
                chosen = scores[places, : len(row_options)]
                calibrations.append(BatchCalibration.of(chosen, row_options, way, made_of))
        if not calibrations:
            most = max((len(places) for places in places_by_options.values()), default=0)
            raise ValueError(
                f"calibration of {spec.name!r} has {most} prompts of one list of options: give as "
                "many prompts as options or more, better a hundred"
            )
        return cls(spec, tuple(calibrations), made_of)

    @property
    def reading(self) -> str:
        """What identifies how its rows become prompts."""
        return reading_of(self.spec)

    @property
    def n_prompts(self) -> int:
        """How many prompts the priors are estimated from."""
        return sum(calibration.n_prompts for calibration in self.by_options)

    def adjusted(
        self,
        scores: Float[Tensor, "n_rows most_options"],
        options: Sequence[Sequence[str]],
        asked_of: str,
    ) -> tuple[Float[Tensor, "n_rows most_options"], list[bool]]:
        """Returns the scores that count, and which rows have a prior taken away.

        Rows whose options have no prior keep their scores.

        Raises:
            ValueError: the priors are of another model or router.
        """
        adjusted = scores.clone()
        is_adjusted = [False] * len(options)
        known = {calibration.options: calibration for calibration in self.by_options}
        for row_options, places in _places(options).items():
            if row_options not in known:
                continue
            n_options = len(row_options)
            chosen = scores[places, :n_options]
            adjusted[places, :n_options] = known[row_options].adjusted(
                chosen, row_options, asked_of
            )
            for place in places:
                is_adjusted[place] = True
        return adjusted, is_adjusted


def _places(options: Sequence[Sequence[str]]) -> dict[tuple[str, ...], list[int]]:
    """Returns which rows have which options."""
    places = defaultdict(list)
    for place, row_options in enumerate(options):
        places[tuple(row_options)].append(place)
    return dict(places)


@dataclass(frozen=True)
class _Entry:
    """What the file says of one prior; its log-probabilities are the tensor of the same place."""

    spec: TaskSpec
    options: tuple[str, ...]
    way: Way
    made_of: str

    __pydantic_config__ = _STRICT


_ENTRIES = TypeAdapter(tuple[_Entry, ...])


def save(folder: Path, calibrations: Sequence[TaskCalibration]) -> None:
    """Writes the calibrations beside a router; none leave no file."""
    if not calibrations:
        if (folder / CALIBRATION).exists():
            (folder / CALIBRATION).unlink()
        return
    entries = []
    tensors = {}
    for calibration in calibrations:
        for prior in calibration.by_options:
            tensors[str(len(entries))] = prior.log_probs.contiguous()
            spec = calibration.spec
            entries.append(_Entry(spec, prior.options, prior.way, calibration.made_of))
    text = _ENTRIES.dump_json(tuple(entries)).decode()
    save_tensors(folder / CALIBRATION, tensors, {"format": _FORMAT, PRIORS: text})


def load(folder: Path, digest: str) -> tuple[TaskCalibration, ...]:
    """Returns the calibrations that lie beside a router.

    Those of another router, which a router that was saved anew may lie beside, are left out, and
    warned of.

    Args:
        folder: the router's.
        digest: its weights'.

    Raises:
        ValueError: the file is damaged, or of a newer version.
    """
    file = folder / CALIBRATION
    if not file.exists():
        return ()
    tensors, metadata = load_tensors(file)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{file} is of format {metadata.get('format')!r}, this version reads {_FORMAT}: "
            "update icrouting"
        )
    try:
        entries = _ENTRIES.validate_json(metadata.get(PRIORS, ""))
    except ValidationError as error:
        raise ValueError(
            f"{file} is damaged: {in_words(error)}; delete it, and calibrate"
        ) from error
    specs: dict[str, TaskSpec] = {}
    priors: dict[tuple[str, str], list[BatchCalibration]] = defaultdict(list)
    for place, entry in enumerate(entries):
        log_probs = tensors.get(str(place), torch.zeros(0, 0))
        if log_probs.shape[1:] != (len(entry.options),) or not log_probs.isfinite().all():
            raise ValueError(
                f"{file} is damaged: expected log-probabilities of {len(entry.options)} options "
                f"for {entry.spec.name!r}, got {tuple(log_probs.shape)}; delete it, and calibrate"
            )
        if not entry.made_of.startswith(f"router {digest} "):
            log.warning(
                "%s: left out the prior of %r, which is of %s and not of the router beside it, %s",
                *(file, entry.spec.name, entry.made_of, digest),
            )
            continue
        prior = BatchCalibration(entry.options, log_probs, entry.way, entry.made_of)
        reading = reading_of(entry.spec)
        specs.setdefault(reading, entry.spec)
        priors[reading, entry.made_of].append(prior)
    return tuple(
        TaskCalibration(specs[reading], tuple(group), made_of)
        for (reading, made_of), group in priors.items()
    )


def joined(
    calibrations: Sequence[TaskCalibration], new: TaskCalibration
) -> tuple[TaskCalibration, ...]:
    """Returns calibrations with a new one, which takes the place of one of the same reading."""
    others = [each for each in calibrations if each.reading != new.reading]
    return (*others, new)


def known_specs(
    sources: Sequence[Source], calibrations: Sequence[TaskCalibration]
) -> list[TaskSpec]:
    """Returns how the tasks read that a router was fitted on, and those that it has priors of."""
    specs = {source.name: source.spec for source in sources}
    for calibration in calibrations:
        specs.setdefault(calibration.spec.name, calibration.spec)
    return list(specs.values())
