"""Kernels: functions that numba compiles at their first call, or reads from its cache beside their source.

Numba is imported at that call. It takes as long to import as BentoML does, and the process that reads the service and
starts its workers calls no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class _Kernel:
    """A function that runs compiled; kernels may call each other."""

    def __init__(self, function: Callable[..., Any], *, keeps_gil: bool = False) -> None:
        update_wrapper(self, function)
        self._function = function
        self._keeps_gil = keeps_gil

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments)

    @cached_property
    def _compiled(self) -> Any:
        import numba

        return numba.njit(cache=True, nogil=not self._keeps_gil)(self._function)

    @property
    def _numba_type_(self) -> Any:
        """What numba takes the kernel for in another one."""
        return self._compiled._numba_type_

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the compiled function, such as `signatures` and `py_func`."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._compiled, name)


def compiled(function: Function) -> Function:
    """Compile a function at its first call, to run without the GIL; kernels are made by this or the next."""
    return cast(Function, _Kernel(function))


def compiled_short(function: Function) -> Function:
    """Compile a function that runs for microseconds and keeps the GIL: to get it back could take a turn of others."""
    return cast(Function, _Kernel(function, keeps_gil=True))
