"""The methods under test: what they are called and how they are made. A new one is a file and a line here."""

from collections.abc import Callable, Sequence

from icrouting.config import Settings
from icrouting.methods.base import Method
from icrouting.methods.calibration import Calibration
from icrouting.methods.i2cl import I2CL
from icrouting.methods.prompting import FewShot, MultiTaskFewShot, ZeroShot
from icrouting.methods.regimes import regimes
from icrouting.methods.routing import Icr
from icrouting.methods.task_vectors import TaskVectors
from icrouting.tasks import known

LEARNING: tuple[type[Method], ...] = (
    TaskVectors,
    I2CL,
)
METHODS: dict[str, Callable[[Settings], Method]] = {
    **{kind.name: kind for kind in (ZeroShot, FewShot, MultiTaskFewShot, Calibration, Icr)},
    **{name: maker for kind in LEARNING for name, maker in regimes(kind).items()},
}


def make(names: Sequence[str], settings: Settings) -> list[Method]:
    """Returns methods by name; ValueError with near matches on an unknown one."""
    kinds = [known("method", name, METHODS) for name in dict.fromkeys(names)]
    return [kind(settings) for kind in kinds]


__all__ = ["METHODS", "Method", "Settings", "make"]
