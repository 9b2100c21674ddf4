"""The methods under test: what they are called and how they are made.

A new one is a file and a line here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from icrouting.methods import controls
from icrouting.methods.atv import Atv, AtvAveraged
from icrouting.methods.base import Method
from icrouting.methods.batch_calibration import BatchCalibration, IcrSafe
from icrouting.methods.calibration import Calibration
from icrouting.methods.cartridge import Cartridge
from icrouting.methods.distilled_probe import ProbeDistilled
from icrouting.methods.domain_calibration import DomainCalibration
from icrouting.methods.elicit import Elicit
from icrouting.methods.entrants import NamedIcr
from icrouting.methods.function_vectors import FunctionVectors
from icrouting.methods.i2cl import I2CL
from icrouting.methods.icr import Icr, IcrGated
from icrouting.methods.icv import ICV
from icrouting.methods.iterative_vectors import IterativeVectors
from icrouting.methods.live import Live
from icrouting.methods.lora import LoraBlock, LoraBlockMore, LoraHead
from icrouting.methods.lora_qv import LoraQv, LoraQvDistilled
from icrouting.methods.m2iv import M2IV
from icrouting.methods.named_prompts import ALL, PREFIX, UserPrompt
from icrouting.methods.probes import ProbeEncoder, ProbeHidden
from icrouting.methods.prompting import FewShot, MultiTaskFewShot, ZeroShot
from icrouting.methods.regimes import ONCE, InDomain, regimes
from icrouting.methods.residual_probe import ProbeResidual
from icrouting.methods.ridge_vectors import RidgeVectors
from icrouting.methods.settings import Entrant, Settings
from icrouting.methods.soft_prompts import PrefixTuning, PromptTuning
from icrouting.methods.spread import SpreadAlpha, SpreadGates
from icrouting.methods.task_vectors import TaskVectors
from icrouting.runtime.checks import known

PLAIN: tuple[type[Method], ...] = (
    *(ZeroShot, FewShot, MultiTaskFewShot),
    *(Calibration, DomainCalibration),
    *(Icr, IcrGated),
    *(SpreadAlpha, SpreadGates),
)
LEARNING: tuple[type[Method], ...] = (
    *(TaskVectors, RidgeVectors, FunctionVectors, ICV, Elicit, IterativeVectors),
    *(I2CL, Live, M2IV),
    *(LoraBlock, LoraHead, LoraBlockMore, LoraQv, LoraQvDistilled),
    *(PrefixTuning, PromptTuning, Cartridge),
    *(Atv, AtvAveraged),
    *(controls.Refit, controls.RandomBasis, controls.LearnedDirections, controls.ConstantFeatures),
    *(controls.RandomFeatures, controls.UniformAlpha, controls.UniformGates),
    *(ProbeHidden, ProbeEncoder, ProbeResidual, ProbeDistilled),
    BatchCalibration,
)
METHODS: dict[str, Callable[[Settings], Method]] = {
    **{kind.name: kind for kind in PLAIN},
    # On each task anew, as those that learn; but what it needs is a router.
    IcrSafe.name: partial(InDomain, kind=IcrSafe),
    **{name: maker for kind in LEARNING for name, maker in regimes(kind).items()},
}


def make(
    names: Sequence[str], settings: Settings, entrants: Sequence[Entrant] = ()
) -> list[Method]:
    """Returns methods by name, each once; `entrants` are routers with names of their own.

    Raises:
        ValueError: a regime that a method lacks, with its reason; or an unknown name, with near
            matches; or two entrants of one name, or one that has a method's.
    """
    return [kind(settings) for kind in _makers(names, entrants)]


def check(names: Sequence[str], entrants: Sequence[Entrant] = ()) -> None:
    """Checks names of methods and of entrants as `make` does; nothing is made, or read."""
    _makers([name for name in names if name != ALL], entrants)


def _makers(
    names: Sequence[str], entrants: Sequence[Entrant]
) -> list[Callable[[Settings], Method]]:
    """Returns what makes the methods of some names; ValueError as `make` says."""
    _check_names(entrants)
    entrant_by_name = {entrant.name: entrant for entrant in entrants}
    # Such a name is known for its reason, which says more than near matches would.
    reasons = {}
    for kind in LEARNING:
        for regime, reason in kind.lacks.items():
            reasons[kind.name + regime] = reason
    for name in names:
        if name in reasons:
            raise ValueError(f"there is no {name!r}: {reasons[name]}")
    return [_maker(name, entrant_by_name) for name in dict.fromkeys(names)]


def _check_names(entrants: Sequence[Entrant]) -> None:
    """ValueError where the name of an entrant is another one's or a method's."""
    names = [entrant.name for entrant in entrants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two routers are called {name!r}: give each a name of its own")
        if name in METHODS or name == ALL or name.startswith(PREFIX):
            raise ValueError(f"a router cannot be called {name!r}, which a method is: rename it")


def _maker(name: str, entrant_by_name: Mapping[str, Entrant]) -> Callable[[Settings], Method]:
    """Returns what makes the method of a name; ValueError for an unknown one."""
    if name in entrant_by_name:
        return partial(NamedIcr, entrant=entrant_by_name[name])
    # These are each task's own: whether it has one of the name, the method says.
    if name.startswith(PREFIX):
        return partial(UserPrompt, name=name)
    # Near matches may be routers, too.
    return known("method", name, {**METHODS, **dict.fromkeys(entrant_by_name, Icr)})


def cuts_of(names: Sequence[str], settings: Settings) -> list[str]:
    """Returns what methods take less of than was published, in sentences.

    The name of a method that is no more says nothing.
    """
    sentences = []
    for kind in (*PLAIN, *LEARNING):
        if kind.name in names or kind.name + ONCE in names:
            sentences += kind.cuts(settings)
    return sentences
