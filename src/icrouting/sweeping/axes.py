"""Axes: the settings that a sweep varies, as they are typed and as a fit takes them.

    rank=4,8,12    basis=pca,random    layers=early,late,20-29    sources=1,3,agnews+sst2

Light, so that a mistake is said before anything heavy is imported; what only the model's depth can
tell is asked of `words`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from icrouting.config import FitConfig
from icrouting.methods.settings import Entrant
from icrouting.runtime.checks import in_words, known
from icrouting.sweeping import words

FITTED: dict[str, Any] = get_type_hints(FitConfig, include_extras=True)
# How a router is attached: another value needs no other fit.
ATTACHED: dict[str, Any] = {"strength": FiniteFloat}
# The tasks that a router is fitted on.
SOURCES = "sources"


@dataclass(frozen=True)
class Axis:
    """One setting that varies, and the values that it takes, as they were typed."""

    name: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Axis":
        """Returns the axis of a text such as "rank=4,8,12".

        Raises:
            ValueError: there is no such setting (near matches are named), no value, or one twice.
        """
        typed_name, sign, typed_values = text.partition("=")
        name = typed_name.strip().removeprefix("--").replace("-", "_")
        axis_names = [*FITTED, *ATTACHED, SOURCES]
        known("axis", name, dict.fromkeys(axis_names))
        values = [value.strip() for value in typed_values.split(",")]
        if not sign or not all(values):
            raise ValueError(f"expected {typed_name}=VALUE,VALUE ..., got {text!r}")
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{name} has the value {value!r} twice: leave one out")
        return cls(name, tuple(values))


@dataclass(frozen=True)
class Base:
    """What a sweep's settings have in common, and what words for values are understood by.

    Attributes:
        config: the fit that axes change.
        sources: the source tasks, of which the axis "sources" takes some.
        n_layers: the model's depth; None where it is not known yet.
    """

    config: FitConfig
    sources: tuple[str, ...]
    n_layers: int | None = None


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: how its router is fitted and attached.

    Attributes:
        values: what each axis is set to, as it was typed; axes that are as they were are missing.
        fit: settings of the fit.
        sources: names of the tasks that it is fitted on.
        attached: settings of `Entrant` that are not its usual ones.
    """

    values: Mapping[str, str]
    fit: FitConfig
    sources: tuple[str, ...]
    attached: Mapping[str, float]

    @classmethod
    def of(cls, values: Mapping[str, str], base: Base) -> "Setting":
        """Returns what values of axes make of a sweep's base.

        Raises:
            ValueError: a value does not fit its axis; both are named.
        """
        changes: dict[str, Any] = {}
        attached: dict[str, float] = {}
        sources = base.sources
        for name, text in values.items():
            try:
                if name == SOURCES:
                    sources = words.chosen_sources(text, base.sources)
                elif name in ATTACHED:
                    attached[name] = _parsed(text, ATTACHED[name])
                else:
                    changes[name] = _fitted_value(name, text, base)
                    # What a fit refuses is refused with the axis that it comes from.
                    replace(base.config, **changes)
            except ValueError as error:
                raise ValueError(f"{name}={text}: {error}") from error
        return cls(values, replace(base.config, **changes), sources, attached)

    @property
    def name(self) -> str:
        """What tables call it: what differs, as it was typed."""
        return named(self.values)

    @property
    def fit_name(self) -> str:
        """The name of its fit, which settings that differ in how it is attached share."""
        return named({name: value for name, value in self.values.items() if name not in ATTACHED})

    def seeded(self, seed: int) -> "Setting":
        """Returns the setting with its fit drawn by another seed, which its name says."""
        values = {**self.values, "seed": str(seed)}
        return replace(self, values=values, fit=replace(self.fit, seed=seed))

    def entrant(self, folder: str) -> Entrant:
        """Returns the setting as a column of a run, with the folder of its router."""
        return Entrant(self.name, folder, **self.attached)


USUAL = "as usual"


def named(values: Mapping[str, str]) -> str:
    """Returns the name of a setting by the values of its axes."""
    # A slash parts the methods of a pair.
    texts = [f"{name}={value.replace('/', ':')}" for name, value in values.items()]
    return " ".join(texts) or USUAL


def _fitted_value(name: str, text: str, base: Base) -> object:
    """The value of a fit's setting that a text stands for."""
    if name == "layers":
        return words.chosen_layers(text, base.n_layers)
    if name == "encoder":
        return words.chosen_encoder(text, base.config.encoder)
    return _parsed(text, FITTED[name])


def _parsed(text: str, hint: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(text)
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def same_as_base(values: Mapping[str, str], base: Base) -> bool:
    """Returns whether values are what the base has anyway."""
    setting = Setting.of(values, base)
    usual = Entrant("usual", "")
    is_usual = all(getattr(usual, name) == value for name, value in setting.attached.items())
    fits = (setting.fit, setting.sources) == (base.config, base.sources)
    # None routes the last third.
    if not fits and base.config.layers is None and base.n_layers is not None:
        late = words.chosen_layers("late", base.n_layers)
        fits = (setting.fit, setting.sources) == (replace(base.config, layers=late), base.sources)
    return is_usual and fits
