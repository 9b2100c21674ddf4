"""Former fits: a folder's files are of one fit, and those of others lie aside until they come back.

FOLDER/fit.json                  the settings of the fit whose training lies here
FOLDER/training.safetensors      its checkpoint
FOLDER/former-1/                 the same of a fit with other settings, which was begun here
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icrouting.config import EARLIER
from icrouting.fitting.extraction import MOMENTS_FILE
from icrouting.fitting.queries import HELD
from icrouting.fitting.shelf import EXTRACTION, EXTRACTION_SETTINGS, TRUNK, TRUNK_SETTINGS, Shelf
from icrouting.fitting.trunk import ENTROPIES_FILE, TRUNK_FILE
from icrouting.runtime.checks import differences
from icrouting.runtime.storage import load_json, save_json

log = logging.getLogger(__name__)

FIT_FILE = "fit.json"
# Where the stages of the fit lie, which a folder of an earlier version has in itself.
PLACES_FILE = "stages.json"
# What is of one fit alone, and a fit of an earlier version kept its stages there too.
_PATTERNS = ("training*", "moments.*", "trunk.*", "fold-*", HELD)
_COMMON = ("tasks", "rows", "model", "dtype", "layers")


def take_up(folder: Path, settings: dict[str, Any], shelf: Shelf) -> None:
    """Makes a folder's files those of a fit with these settings: new ones, or where it was left.

    A kill leaves nothing that the next fit would take for its own, and loses nothing. One process
    alone may be here.
    """
    file = folder / FIT_FILE
    earlier = _begun(file, settings) if file.exists() else None
    phrases = [] if earlier is None else differences(earlier, settings)
    if earlier is not None:
        _shelve(folder, earlier, settings, shelf)
    if earlier is not None and phrases and _files(folder):
        log.warning(
            "%s holds a fit with other settings (%s): it is set aside, and goes on when it is "
            "started again",
            *(folder, ", ".join(phrases)),
        )
        _set_aside(folder, earlier)
    if earlier is None or phrases:
        save_json(file, settings)
    place = _aside_place(folder, settings)
    # It was begun here before, and goes on.
    if place is not None:
        _move(_files(place), folder)
        (place / FIT_FILE).unlink()
        place.rmdir()
        _shelve(folder, settings, settings, shelf)
    places = {EXTRACTION: shelf.extraction, TRUNK: shelf.trunk}
    known = {name: _under(folder, path) for name, path in places.items() if path is not None}
    if known:
        save_json(folder / PLACES_FILE, known)


def places_of(folder: Path) -> Mapping[str, Path]:
    """Returns the folders of the stages of the fit that a folder holds, by name."""
    file = folder / PLACES_FILE
    if not file.exists():
        return {EXTRACTION: folder, TRUNK: folder}
    # A path that is absolute stays so.
    return {name: folder / path for name, path in load_json(file).items()}


def _begun(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the fit that a file names; what it does not tell is as in `settings`.

    Earlier versions kept nothing of a fit's dtype and tokenizer.
    """
    untold = {name: settings[name] for name in ("dtype", "tokens") if name in settings}
    return {**EARLIER, **untold, **load_json(file)}


def _under(folder: Path, path: Path) -> str:
    """Returns a path as seen from a folder that it lies in, so that both can be moved."""
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return str(path.absolute())


def _files(folder: Path) -> list[Path]:
    files = []
    for pattern in _PATTERNS:
        files += sorted(folder.glob(pattern))
    return files


def _move(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        file.replace(folder / file.name)


def _aside_place(folder: Path, settings: dict[str, Any]) -> Path | None:
    """Returns where a fit with these settings lies aside, None where none does."""
    for file in sorted(folder.glob(f"former-*/{FIT_FILE}")):
        if not differences(_begun(file, settings), settings):
            return file.parent
    return None


def _set_aside(folder: Path, earlier: dict[str, Any]) -> None:
    """Moves a fit's files to a folder of their own."""
    number = 1
    while (folder / f"former-{number}").exists():
        number += 1
    place = folder / f"former-{number}"
    place.mkdir()
    # Before the files, so that a kill leaves none without the settings that it is of.
    save_json(place / FIT_FILE, earlier)
    _move(_files(folder), place)


def _shelve(folder: Path, earlier: dict[str, Any], settings: dict[str, Any], shelf: Shelf) -> None:
    """Moves the stages that an earlier version left beside fit.json to where they are looked for.

    Those that depend on other settings stay.
    """
    stages = (
        (EXTRACTION_SETTINGS, (MOMENTS_FILE,), shelf.extraction),
        # The entropies vouch for the states, so they come last.
        (TRUNK_SETTINGS, (TRUNK_FILE, ENTROPIES_FILE), shelf.trunk),
    )
    for names, file_names, place in stages:
        files = [folder / name for name in file_names]
        are_there = all(file.exists() for file in files)
        asked = {name: settings[name] for name in (*names, *_COMMON)}
        if place is None or not are_there or differences(earlier, asked):
            continue
        if (place / file_names[-1]).exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            try:
                file.replace(place / file.name)
            # A shelf on another disk: the stage is computed anew there.
            except OSError as error:
                log.warning("%s cannot be moved to %s (%s)", file, place, error)
