"""Checks of shapes and dtypes in tests, where an annotation names them.

`jaxtyping` has every function of the package checked on every call, which doubled the time of the
suite. Most of that went to functions that name no array at all, and to those inside other
functions, which are compiled anew each time that the outer one runs.
"""

import jaxtyping

_ARRAYS = ("Bool[", "Float[", "Int[", "Shaped[")
_plain_jaxtyped = jaxtyping.jaxtyped


def _names_an_array(target) -> bool:
    hints = map(str, getattr(target, "__annotations__", {}).values())
    return any(array in hint for hint in hints for array in _ARRAYS)


def _jaxtyped(*, typechecker):
    """What the import hook puts on every function and class of the package."""

    def decorate(target):
        is_inner = "<locals>" in target.__qualname__
        if is_inner or not _names_an_array(target):
            return target
        return _plain_jaxtyped(typechecker=typechecker)(target)

    return decorate


def check_where_arrays_are_named() -> None:
    """Makes the checks of modules that are imported from now on fewer."""
    jaxtyping.jaxtyped = _jaxtyped
