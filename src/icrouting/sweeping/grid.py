"""Grid: every setting of a sweep, and which of them the others are held against."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icrouting.runtime.checks import known
from icrouting.sweeping import words
from icrouting.sweeping.axes import Axis, Base, Setting, named, same_as_base

# Stands for each layer alone.
SINGLE = "single"


@dataclass(frozen=True)
class Column:
    """One router of a sweep: a setting, and what it is fitted as.

    Attributes:
        setting: the name of the setting.
        fitted: the setting, with the seed of its fit where there are several.
        seed: that seed; None where each setting is fitted once.
    """

    setting: str
    fitted: Setting
    seed: int | None


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep, in the order of its table.

    Attributes:
        axes: what varies.
        settings: one for each combination of their values, or for each value alone.
        reference: the one that the others are held against.
        seeds: each setting is fitted anew for each of them; none is once, by the fit's own.
    """

    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...]
    reference: Setting
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        axes: Sequence[Axis],
        base: Base,
        *,
        one_by_one: bool = False,
        reference: str | None,
        seeds: Sequence[int] = (),
    ) -> "Grid":
        """Returns all settings of some axes.

        Args:
            axes: what varies; none is the base alone.
            base: what is not varied.
            one_by_one: whether each value is tried alone, beside the base as it is, instead of
                with each value of the other axes.
            reference: such as "rank=8" or "rank=8 basis=pca"; None takes the setting that is as
                the base, else the first one.
            seeds: for each of which every setting is fitted.

        Raises:
            ValueError: a value does not fit its axis, two settings are the same, or no setting is
                the reference.
        """
        names = [axis.name for axis in axes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the axis {name} is given twice: list all of its values in one")
        if seeds and "seed" in names:
            raise ValueError("seed is an axis, and --seeds fits each setting anew: leave one out")
        whole_axes = tuple(_with_single_layers(axis, base) for axis in axes)
        settings = []
        for values in _combinations(whole_axes, one_by_one=one_by_one):
            # Beside the base as it is, its own values would be the base again.
            if not (one_by_one and values and same_as_base(values, base)):
                settings.append(Setting.of(values, base))
        _check_differ(settings)
        chosen = _reference(settings, base, reference)
        return cls(whole_axes, tuple(settings), chosen, tuple(dict.fromkeys(seeds)))

    @property
    def columns(self) -> list[Column]:
        """What is evaluated: every setting, as often as it is fitted."""
        columns = []
        for setting in self.settings:
            if not self.seeds:
                columns.append(Column(setting.name, setting, None))
            for seed in self.seeds:
                columns.append(Column(setting.name, setting.seeded(seed), seed))
        return columns

    @property
    def fits(self) -> dict[str, Setting]:
        """What needs a fit of its own, by the name of the fit."""
        fits: dict[str, Setting] = {}
        for column in self.columns:
            fits.setdefault(column.fitted.fit_name, column.fitted)
        return fits

    @property
    def reference_fit(self) -> Setting:
        """The reference as it is fitted, for methods that build on one router."""
        return self.reference.seeded(self.seeds[0]) if self.seeds else self.reference


def _with_single_layers(axis: Axis, base: Base) -> Axis:
    """An axis of layers with each layer in the place of "single"."""
    if axis.name != "layers" or SINGLE not in axis.values:
        return axis
    if base.n_layers is None:
        # As many as there surely are; the depth is asked before anything runs.
        singles: tuple[str, ...] = ("0",)
    else:
        singles = words.single_layers(base.n_layers)
    values: list[str] = []
    for value in axis.values:
        values += singles if value == SINGLE else (value,)
    return replace(axis, values=tuple(dict.fromkeys(values)))


def _combinations(axes: Sequence[Axis], *, one_by_one: bool) -> list[dict[str, str]]:
    """The values of each setting by the axis."""
    if one_by_one:
        alone = [{axis.name: value} for axis in axes for value in axis.values]
        return [{}, *alone]
    combinations = []
    for values in itertools.product(*(axis.values for axis in axes)):
        combinations.append(dict(zip([axis.name for axis in axes], values, strict=True)))
    return combinations


def _check_differ(settings: Sequence[Setting]) -> None:
    """ValueError where two settings would be the same fit, attached alike."""
    for one, other in itertools.combinations(settings, 2):
        # Until the model's depth is known, words for layers all read None.
        are_words = one.fit.layers is None or other.fit.layers is None
        if not are_words and _meaning(one) == _meaning(other):
            raise ValueError(f"{one.name} and {other.name} are the same setting: leave one out")


def _meaning(setting: Setting) -> tuple[object, ...]:
    return setting.fit, setting.sources, dict(setting.attached)


def _reference(settings: Sequence[Setting], base: Base, text: str | None) -> Setting:
    by_name = {setting.name: setting for setting in settings}
    if text is not None:
        return known("reference", named(_values_of(text)), by_name)
    for setting in settings:
        if same_as_base(setting.values, base):
            return setting
    return settings[0]


def _values_of(text: str) -> Mapping[str, str]:
    """The values of axes in a text such as "rank=8 basis=pca"; none for "as usual"."""
    values = {}
    for part in text.split():
        name, sign, value = part.partition("=")
        if sign:
            values[name.replace("-", "_")] = value
    return values
