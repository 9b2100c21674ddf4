"""Asked: what a sweep is asked for, checked as far as it can be without the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from icrouting.sweeping.axes import Axis, Base
from icrouting.sweeping.grid import Grid
from icrouting.sweeping.presets import PRESETS, preset_of


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for.

    Attributes:
        axes: what varies.
        base: what the axes change.
        one_by_one: whether each value is tried alone, beside the base as it is.
        reference: the setting that the others are held against, as it was typed; None takes the
            one that is as the base, else the first.
        found: what the paper found, in a sentence; empty where nobody says.
        methods: asked beside the settings, for a preset.
        seeds: for each of which every setting is fitted; none is once.
    """

    axes: tuple[Axis, ...]
    base: Base
    one_by_one: bool
    reference: str | None
    found: str = ""
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        axes: Sequence[str],
        preset: str | None,
        base: Base,
        *,
        one_by_one: bool = False,
        reference: str | None = None,
        seeds: Sequence[int] = (),
    ) -> "Asked":
        """Returns what axes or a preset ask for.

        Args:
            axes: such as "rank=4,8,12".
            preset: the name of one of the paper's ablations, in place of axes.
            base: what is not varied.
            one_by_one: see `Grid.of`.
            reference: see `Grid.of`.
            seeds: see `Grid.of`.

        Raises:
            ValueError: an unknown axis or preset (near matches are named), both or neither of
                them, or a value that a fit refuses.
        """
        if preset is None and not axes:
            raise ValueError(
                "nothing to sweep: give an axis, as in `icr sweep rank=4,8,12`, or --preset "
                f"{', '.join(PRESETS)}"
            )
        if preset is not None and axes:
            raise ValueError(f"--preset {preset} has axes of its own: leave {' '.join(axes)} out")
        if preset is None:
            asked = cls(tuple(map(Axis.read, axes)), base, one_by_one, reference)
        else:
            known_preset = preset_of(preset)
            asked = cls(
                tuple(map(Axis.read, known_preset.axes)),
                base,
                one_by_one or known_preset.one_by_one,
                reference or known_preset.reference,
                f"{known_preset.found} ({known_preset.section})",
                known_preset.methods,
            )
        asked = replace(asked, seeds=tuple(seeds))
        # A value that no fit takes is refused at once, whatever model it is.
        asked.grid(None)
        return asked

    def grid(self, n_layers: int | None) -> Grid:
        """Returns all settings on a model of this depth; None tells what is known without it."""
        base = replace(self.base, n_layers=n_layers)
        return Grid.of(
            self.axes, base, one_by_one=self.one_by_one, reference=self.reference, seeds=self.seeds
        )
