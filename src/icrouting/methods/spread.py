"""Controls of a fitted router: its magnitude, spread evenly (the paper's uniform ablations).

Nothing is fitted anew, unlike for `icr-uniform-alpha` and `icr-uniform-gates`. What such a control
loses to `icr` is what the router gains by choosing among directions, or among heads.
"""

from icrouting.methods.icr import Icr
from icrouting.routing.reader import Gate, Reader
from icrouting.routing.router import Spread


class _SpreadEvenly(Icr):
    """A router that gives the magnitude of each layer to all of its directions or heads alike."""

    what: Spread

    def _read_by(self, gate: Gate | None) -> Reader:
        return self._router.reader(self.decoder, gate=gate, spread=self.what)


class SpreadAlpha(_SpreadEvenly):
    """Every direction of a layer gets the mean |alpha| that its router gave to all of them."""

    name = "icr-spread-alpha"
    what = "alpha"


class SpreadGates(_SpreadEvenly):
    """Every head of a layer gets the mean gate that its router gave to all of them."""

    name = "icr-spread-gates"
    what = "gates"
