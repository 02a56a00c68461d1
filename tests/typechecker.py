"""The checks under which the package runs in tests: types by beartype, and by jaxtyping the shapes that are stated.

jaxtyping binds and checks the arguments of a call twice, which takes ten times as long as beartype does and says
more only about arrays. A function whose signature states no shape is left to beartype. Its bytecode files jaxtyping
keeps under a name of their own, and with them those of all that the package imports; here it does so for its own alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from types import CodeType, FunctionType
from typing import Any, get_args
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, _decorator, _import_hook

checked = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int may stand where a float is asked for (PEP 484)
        violation_type=TypeCheckError,  # a TypeError, as what the package meets without these checks
    )
)
_jaxtyped = _decorator.jaxtyped


def install() -> None:
    """Checks all that is imported of the package from now on."""
    _decorator.jaxtyped = jaxtyping.jaxtyped = _checked
    _import_hook._JaxtypingLoader.get_code = _get_code
    _import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module
    jaxtyping.install_import_hook("persona_rlhf", f"{__name__}.checked")


def _checked(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """Stands in for `jaxtyping.jaxtyped`, which comes back to it with the functions of classes and properties."""
    if function is None:
        return partial(_checked, typechecker=typechecker)
    if not isinstance(function, FunctionType):
        return _jaxtyped(function, typechecker=typechecker)
    written = function.__annotations__
    read = {name: _decorator._destring_annotation(hint, function.__globals__) for name, hint in written.items()}
    if any(map(_states_shape, read.values())):
        return _jaxtyped(function, typechecker=typechecker)
    function.__annotations__ = read
    wrapped = typechecker(function)
    function.__annotations__ = wrapped.__annotations__ = written
    return wrapped


def _states_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_states_shape, get_args(hint)))


def _get_code(loader: Any, name: str) -> CodeType | None:
    renamed = partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", renamed):
        return SourceFileLoader.get_code(loader, name)
