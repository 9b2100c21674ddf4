"""Once: which stages the fits of a sweep have in common, told before anything runs."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from icrouting.config import FitConfig
from icrouting.fitting.shelf import EXTRACTION_SETTINGS, TRUNK_SETTINGS
from icrouting.routing.pids import late_third
from icrouting.runtime.pages import counted
from icrouting.sweeping.axes import Setting


@dataclass(frozen=True)
class Stages:
    """The names of the fits that share each extraction, each set of PIDs and each trunk."""

    extractions: list[list[str]]
    pids: list[list[str]]
    trunks: list[list[str]]

    @classmethod
    def of(cls, fits: Mapping[str, Setting], n_layers: int) -> "Stages":
        """Returns what fits share, by what each stage depends on (`fitting.shelf`)."""
        extractions: dict[Hashable, list[str]] = {}
        pids: dict[Hashable, list[str]] = {}
        trunks: dict[Hashable, list[str]] = {}
        for name, setting in fits.items():
            fit = setting.fit
            layers = fit.layers or late_third(n_layers)
            extraction = (_prompts(setting), _widest(setting, fits, n_layers))
            # The rows that are judged on depend on these two.
            is_judged = bool(fit.min_steps and fit.patience)
            trunk = (setting.sources, layers[0], _values(fit, TRUNK_SETTINGS), is_judged)
            extractions.setdefault(extraction, []).append(name)
            pids.setdefault((extraction, layers, fit.basis, fit.rank), []).append(name)
            trunks.setdefault(trunk, []).append(name)
        return cls(list(extractions.values()), list(pids.values()), list(trunks.values()))

    def in_words(self, n_settings: int) -> list[str]:
        """Returns a line a stage: how often it is computed, of how many settings."""
        n_fits = sum(map(len, self.pids))
        return [
            f"extraction: {_times(self.extractions)}",
            f"PIDs: {_times(self.pids)}",
            f"trunk: {_times(self.trunks)}",
            f"training: {counted(n_fits, 'fit')}",
            f"evaluation: one run of {counted(n_settings, 'setting')}; what else is asked, once",
        ]


def in_order(fits: Mapping[str, Setting], n_layers: int) -> list[str]:
    """Returns the names of fits in an order in which each finds the most that others computed.

    What an extraction of more layers saw holds what one of fewer layers sees.
    """

    def n_routed(name: str) -> int:
        return len(fits[name].fit.layers or late_third(n_layers))

    return sorted(fits, key=n_routed, reverse=True)


def _prompts(setting: Setting) -> Hashable:
    """What the prompts of an extraction depend on."""
    return setting.sources, _values(setting.fit, EXTRACTION_SETTINGS)


def _widest(setting: Setting, fits: Mapping[str, Setting], n_layers: int) -> tuple[int, ...]:
    """The layers of the extraction that a fit takes: the most that hold all of its own."""
    layers = setting.fit.layers or late_third(n_layers)
    # As `fitting.shelf.load_wider_moments`.
    if setting.fit.skip_nan:
        return layers
    holding = [layers]
    for other in fits.values():
        other_layers = other.fit.layers or late_third(n_layers)
        if set(layers) < set(other_layers) and _prompts(other) == _prompts(setting):
            holding.append(other_layers)
    return max(holding, key=len)


def _values(fit: FitConfig, names: tuple[str, ...]) -> tuple[Hashable, ...]:
    return tuple(getattr(fit, name) for name in names)


def _times(groups: list[list[str]]) -> str:
    if len(groups) == 1:
        return f"once for {counted(len(groups[0]), 'fit')}"
    shared = [group for group in groups if len(group) > 1]
    text = counted(len(groups), "time")
    if shared:
        text += f", of which {len(shared)} for several fits"
    return text
