"""Places: where hooked modules are in a model, to notice when one is not there any more."""

from collections import OrderedDict
from typing import Any

from torch import nn


class HookedModules:
    """The modules of a model that got hooks, which are to stay in their places.

    A module that is replaced, wrapped or removed takes its hooks along: what stands in its place
    runs without them, and nobody would be told.
    """

    def __init__(self, base: nn.Module):
        self._base = base
        self._ids_before: set[int] = set()
        for module in base.modules():
            for hooks in _hooks_of(module):
                self._ids_before.update(hooks)
        # By path: the children that a module is among, its name there, and who is to be there.
        self._places: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        # Of each module its hooks, and those that came since, in order.
        self._hooks: list[tuple[str, OrderedDict[int, Any], list[int]]] = []

    def note(self) -> None:
        """Takes up the hooks that were put on the model since this was made."""
        self._places.clear()
        self._hooks.clear()
        for path, module in self._base.named_modules(remove_duplicate=False):
            for hooks in _hooks_of(module):
                ids = [each for each in hooks if each not in self._ids_before]
                if ids:
                    self._hooks.append((path, hooks, ids))
                    self._add_place(path)

    def _add_place(self, path: str) -> None:
        parent = self._base
        names = path.split(".") if path else []
        for depth, name in enumerate(names):
            child = parent.get_submodule(name)
            self._places[".".join(names[: depth + 1])] = (parent._modules, name, child)
            parent = child

    def check(self) -> None:
        """Checks that every module is where it was, and its hooks too, behind those of others.

        RuntimeError names the first that is not.
        """
        for path, (children, name, module) in self._places.items():
            if children.get(name) is not module:
                raise RuntimeError(
                    f"`{path}` was replaced, wrapped or removed while the model is attached: leave "
                    "`attached` before you change the model, and attach it again"
                )
        for path, hooks, ids in self._hooks:
            if list(hooks)[-len(ids) :] == ids:
                continue
            for each in ids:
                if each not in hooks:
                    raise RuntimeError(
                        f"the hooks of `{path}` were removed while the model is attached: leave "
                        "`attached` before you change the model, and attach it again"
                    )
                # What other hooks change, is there when ours are called.
                hooks.move_to_end(each)


def _hooks_of(module: nn.Module) -> tuple[OrderedDict[int, Any], OrderedDict[int, Any]]:
    forward_hooks: Any = module._forward_hooks
    forward_pre_hooks: Any = module._forward_pre_hooks
    return forward_hooks, forward_pre_hooks
