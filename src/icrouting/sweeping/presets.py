"""Presets: the paper's ablations by name, read from presets.toml."""

import tomllib
from dataclasses import dataclass
from importlib import resources

from icrouting.runtime.checks import check, known


@dataclass(frozen=True)
class Preset:
    """One ablation: a table of presets.toml, whose head explains every key."""

    name: str
    axes: tuple[str, ...]
    found: str
    section: str
    reference: str | None = None
    one_by_one: bool = False
    methods: tuple[str, ...] = ()

    def __post_init__(self):
        check(self)


def _presets() -> dict[str, Preset]:
    text = resources.files("icrouting.sweeping").joinpath("presets.toml").read_text("utf-8")
    presets = {}
    for name, entry in tomllib.loads(text).items():
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        presets[name] = Preset(name, **{**entry, **lists})
    return presets


PRESETS = _presets()


def preset_of(name: str) -> Preset:
    """Returns a preset; ValueError with near matches for an unknown one."""
    return known("preset", name, PRESETS)
