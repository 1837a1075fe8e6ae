"""Matrix product of two tiles: on the tensor cores for 16-bit operands, in full float32 otherwise."""

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
