"""Places: where hooked modules are in a model, to notice when one is not there any more."""

from torch import nn


class Places:
    """Modules of a model by their places.

    A module that is replaced, wrapped or removed takes its hooks along: what stands in its place
    runs without them, and nobody would be told.
    """

    def __init__(self, root: nn.Module):
        self._root = root
        self._places: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}

    def add(self, module: nn.Module) -> None:
        """Remembers where a module of the model is, and all that it is inside of."""
        path = _path_to(self._root, module)
        parent = self._root
        names = path.split(".")
        for depth, name in enumerate(names):
            child = parent.get_submodule(name)
            # The children that it is among, its name there, and who is to be there.
            place = (parent._modules, name, child)
            self._places[".".join(names[: depth + 1])] = place
            parent = child

    def check(self) -> None:
        """Checks that every module is where it was; RuntimeError names the first that is not."""
        for path, (children, name, module) in self._places.items():
            if children.get(name) is not module:
                raise RuntimeError(
                    f"`{path}` was replaced, wrapped or removed while the model is attached: leave "
                    "`attached` before you change the model, and attach it again"
                )


def _path_to(root: nn.Module, module: nn.Module) -> str:
    for path, candidate in root.named_modules(remove_duplicate=False):
        if candidate is module:
            return path
    raise ValueError(f"{type(module).__name__} is no module of {type(root).__name__}")
