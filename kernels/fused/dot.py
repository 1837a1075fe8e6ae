"""Matrix product of two tiles, on the tensor cores for 16-bit operands and in full float32 otherwise; and rounding."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """Return ``total + a @ b`` in float32, after rounding ``a`` to the dtype of ``b``.

    Triton's interpreter would multiply the bit patterns of bfloat16, and truncates where a GPU rounds.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a.to(b.dtype), b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 ``x`` rounded to the nearest value of ``dtype``; Triton's interpreter truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
