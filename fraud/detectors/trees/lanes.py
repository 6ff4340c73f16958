"""Eight float64 side by side as one value in numba kernels: LLVM's vector type, independent of auto-vectorisation.

One AVX-512 register, two of AVX2, four of NEON: LLVM lowers it to what the machine has. Numba's cache watches a
kernel's own file alone: after a change here, touch the modules that import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fraud.compiling import compiled

WIDTH = 8
_VECTOR = ir.VectorType(ir.DoubleType(), WIDTH)


class Lanes(types.Type):
    """The numba type of eight float64."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{WIDTH}")


LANES = Lanes()


def _instruction(build: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of kernels from one that gives its signature and its LLVM code."""
    return cast(Callable[..., Any], intrinsic(build))


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """LLVM's <8 x double>."""

    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)  # type: ignore[no-untyped-call]


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _VECTOR.as_pointer())


@_instruction
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """Return array[index : index + 8] of a flat float64 array; no bounds are checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args), align=8)

    return LANES(array, types.intp), codegen


@_instruction
def store(typing_context: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Set array[index : index + 8] of a flat float64 array; no bounds are checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args), align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES), codegen


@_instruction
def splat(typing_context: Any, scalar: Any) -> Any:
    """Return eight times the same number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
        return builder.shuffle_vector(first, undefined, zeros)

    return LANES(types.float64), codegen


@_instruction
def at_most(typing_context: Any, a: Any, b: Any) -> Any:
    """Return 1.0 where a <= b, 0.0 elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one, zero = (ir.Constant(_VECTOR, [value] * WIDTH) for value in (1.0, 0.0))
        return builder.select(builder.fcmp_ordered("<=", *args), one, zero)

    return LANES(LANES, LANES), codegen


@_instruction
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once: the same bits wherever LLVM puts it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = f"llvm.fma.v{WIDTH}f64"
        if name not in builder.module.globals:
            ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
        return builder.call(builder.module.globals[name], args)

    return LANES(LANES, LANES, LANES), codegen


def _arithmetic(instruction: str) -> Callable[..., Any]:
    def operation(typing_context: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return LANES(LANES, LANES), codegen

    return _instruction(operation)


sub = _arithmetic("fsub")
mul = _arithmetic("fmul")


@compiled
def aligned(size: int) -> Any:
    """Return an uninitialised float64 array (size,) that starts on a cache line."""
    array = np.empty(size + WIDTH)
    skip = (64 - array.ctypes.data % 64) % 64 // 8
    return array[skip : skip + size]
