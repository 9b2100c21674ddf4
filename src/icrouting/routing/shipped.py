"""Shipped calibrations: the priors of whole tasks, which lie in a router's folder beside it."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from icrouting.routing.calibration import DEFAULT_WAY, BatchCalibration, scored_by
from icrouting.routing.ownership import CALIBRATION, PRIORS
from icrouting.routing.priors import Way, fewest_prompts
from icrouting.routing.sources import Source
from icrouting.runtime.checks import in_words
from icrouting.runtime.showing import in_short
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.task import TaskSpec

log = logging.getLogger(__name__)
_FORMAT = "1"
_SHA256 = "sha256"
_OWN_GATE = "its own gate"
_STRICT = ConfigDict(extra="forbid")


def reading_of(spec: TaskSpec) -> str:
    """Returns what identifies how rows become prompts, whatever a task is called."""
    words = sorted((field, sorted(texts.items())) for field, texts in spec.words.items())
    parts = (spec.template, spec.options, words, spec.label_scoring, spec.chat, spec.system)
    return repr(parts)


@dataclass(frozen=True)
class TaskCalibration:
    """The priors of one task: one for each list of options that its rows have.

    The model's dtype is no part of what it is of: from float32 to bfloat16 a prior moves by less
    than a hundredth of what scores vary by, which is less than the dtype does to the answers.

    Attributes:
        spec: how it reads; a prior says nothing of other templates.
        by_options: the priors.
        made_of: what gave the scores.
        chat_template: digits that identify the template that worded its chats; empty where there
            are none, and in files of earlier versions.
    """

    spec: TaskSpec
    by_options: tuple[BatchCalibration, ...]
    made_of: str
    chat_template: str = ""

    @classmethod
    def of(
        cls,
        spec: TaskSpec,
        scores: Float[Tensor, "n_rows most_options"],
        options: Sequence[Sequence[str]],
        way: Way = DEFAULT_WAY,
        made_of: str = "",
        chat_template: str = "",
    ) -> "TaskCalibration":
        """Returns the calibration by the scores of some rows, whose options may differ.

        Options that fewer rows have than there are options get no prior.

        Raises:
            ValueError: no list of options has rows enough.
        """
        places_by_options = _places(options)
        calibrations = []
        asked_of = scored_by(made_of, spec.label_scoring)
        for row_options, places in places_by_options.items():
            if len(places) >= fewest_prompts(len(row_options)):
                chosen = scores[places, : len(row_options)]
                calibrations.append(BatchCalibration.of(chosen, row_options, way, asked_of))
        if not calibrations:
            most = max((len(places) for places in places_by_options.values()), default=0)
            raise ValueError(
                f"calibration of {spec.name!r} has {most} prompts of one list of options: give as "
                "many prompts as options or more, better a hundred"
            )
        return cls(spec, tuple(calibrations), made_of, chat_template)

    @property
    def reading(self) -> str:
        """What identifies how its rows become prompts."""
        return reading_of(self.spec)

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of: of each there is one."""
        return self.reading, self.made_of, self.chat_template

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
        asked_of = scored_by(asked_of, self.spec.label_scoring)
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
    chat_template: str = ""

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
            made_of = calibration.made_of
            template = calibration.chat_template
            entries.append(_Entry(spec, prior.options, prior.way, made_of, template))
    content = _ENTRIES.dump_python(tuple(entries), mode="json")
    for entry in content:
        # What an earlier version wrote is written as it was.
        if not entry["chat_template"]:
            del entry["chat_template"]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    metadata = {"format": _FORMAT, PRIORS: text, _SHA256: _sha256(text, tensors)}
    save_tensors(folder / CALIBRATION, tensors, metadata)


def _sha256(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns what identifies a file's content."""
    content = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        content.update(f"{name} {tuple(tensors[name].shape)}".encode())
        content.update(tensors[name].numpy().tobytes())
    return content.hexdigest()


def load(folder: Path, digest: str, gate_digest: str = "") -> tuple[TaskCalibration, ...]:
    """Returns the calibrations that lie beside a router.

    Those of another router, which a router that was saved anew may lie beside, are left out, and
    warned of.

    Args:
        folder: the router's.
        digest: its weights'.
        gate_digest: its gate's; empty where it has none.

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
    text = metadata.get(PRIORS, "")
    # An earlier version kept no digest.
    if metadata.get(_SHA256) not in (None, _sha256(text, tensors)):
        raise ValueError(
            f"{file} is damaged: its sha256 is not the one that it names; delete it, and calibrate"
        )
    try:
        entries = _ENTRIES.validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"{file} is damaged: {in_words(error)}; delete it, and calibrate"
        ) from error
    specs: dict[str, TaskSpec] = {}
    priors: dict[tuple[str, str, str], list[BatchCalibration]] = defaultdict(list)
    for place, entry in enumerate(entries):
        log_probs = tensors.get(str(place), torch.zeros(0, 0))
        if log_probs.shape[1:] != (len(entry.options),) or not log_probs.isfinite().all():
            raise ValueError(
                f"{file} is damaged: expected log-probabilities of {len(entry.options)} options "
                f"for {entry.spec.name!r}, got {tuple(log_probs.shape)}; delete it, and calibrate"
            )
        made_of = entry.made_of
        # An earlier version did not say which gate it was.
        if made_of.endswith(_OWN_GATE):
            made_of += f" {gate_digest}"
        if not _is_of(made_of, digest, gate_digest):
            log.warning(
                "%s: left out the prior of %r, which is of %s and not of the router beside it, %s",
                *(file, entry.spec.name, entry.made_of, digest),
            )
            continue
        asked_of = scored_by(made_of, entry.spec.label_scoring)
        prior = BatchCalibration(entry.options, log_probs, entry.way, asked_of)
        reading = reading_of(entry.spec)
        specs.setdefault(reading, entry.spec)
        priors[reading, made_of, entry.chat_template].append(prior)
    return tuple(
        TaskCalibration(specs[reading], tuple(group), made_of, chat_template)
        for (reading, made_of, chat_template), group in priors.items()
    )


def _is_of(made_of: str, digest: str, gate_digest: str) -> bool:
    """Whether what gave scores is a router with these digests, in another process too."""
    if not made_of.startswith(f"router {digest} ") or "another gate" in made_of:
        return False
    return _OWN_GATE not in made_of or made_of.endswith(f"{_OWN_GATE} {gate_digest}")


def joined(
    calibrations: Sequence[TaskCalibration], new: TaskCalibration
) -> tuple[TaskCalibration, ...]:
    """Returns calibrations with a new one, which takes the place of one of the same."""
    others = [each for each in calibrations if each.key != new.key]
    return (*others, new)


def known_specs(
    sources: Sequence[Source], calibrations: Sequence[TaskCalibration]
) -> list[TaskSpec]:
    """Returns how the tasks read that a router was fitted on, and those that it has priors of.

    A name stands twice where two templates have it.
    """
    specs: dict[tuple[str, str], TaskSpec] = {}
    for spec in [source.spec for source in sources] + [each.spec for each in calibrations]:
        specs.setdefault((spec.name, reading_of(spec)), spec)
    return list(specs.values())


def check_name(spec: TaskSpec, known: Sequence[TaskSpec]) -> None:
    """Checks that a task's name stands for no other template; ValueError if it does."""
    for other in known:
        if other.name == spec.name and reading_of(other) != reading_of(spec):
            raise ValueError(
                f"a task {spec.name!r} is known here already and reads otherwise "
                f"({other.template!r}, options {in_short(other.options)}): give this one a name "
                "of its own (`name` in a task file), or its prior could not be asked for by name"
            )
