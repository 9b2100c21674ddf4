"""The methods under test: what they are called and how they are made. A new one is a file and a line here."""

from collections.abc import Callable, Sequence

from icrouting.config import Settings
from icrouting.methods.base import Method, in_domain, once
from icrouting.methods.calibration import Calibration
from icrouting.methods.i2cl import I2CL
from icrouting.methods.prompting import FewShot, MultiTaskFewShot, ZeroShot
from icrouting.methods.routing import Icr
from icrouting.methods.task_vectors import TaskVectors
from icrouting.tasks import known

METHODS: dict[str, Callable[[Settings], Method]] = {
    "zero-shot": ZeroShot,
    "few-shot": FewShot,
    "multi-task-few-shot": MultiTaskFewShot,
    "calibration": Calibration,
    "task-vectors": in_domain(TaskVectors),
    "task-vectors-once": once(TaskVectors),
    "i2cl": in_domain(I2CL),
    "i2cl-once": once(I2CL),
    "icr": Icr,
}


def make(names: Sequence[str], settings: Settings) -> list[Method]:
    """Returns methods by name; ValueError with near matches on an unknown one."""
    kinds = [known("method", name, METHODS) for name in dict.fromkeys(names)]
    return [kind(settings) for kind in kinds]


__all__ = ["METHODS", "Method", "Settings", "make"]
