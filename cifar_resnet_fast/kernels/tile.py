"""What kernels do to a tile as they load it, or before they store it (layer 0).

Symbols as in conv3x3_bwd.py.
"""

import triton
import triton.language as tl


@triton.jit
def relu_tile(z):
    """max(z, 0), and NaN where z is, as PyTorch has it: a run that diverges must show."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bn_relu(x, scale, shift):
    """relu(scale * x + shift) of a raw tile [pixels, channels], in float32."""
    return relu_tile(x.to(tl.float32) * scale[None, :] + shift[None, :])


@triton.jit
def bn_bwd(dz, y, c0, c1, c2, scale, shift, RELU: tl.constexpr):
    """dy = c0 * dz + c1 * y + c2 in float32, the ReLU undone first where RELU."""
    y = y.to(tl.float32)
    dz = dz.to(tl.float32)
    if RELU:
        dz = tl.where(y * scale[None, :] + shift[None, :] > 0, dz, 0.0)
    return dz * c0[None, :] + y * c1[None, :] + c2[None, :]


@triton.jit
def finish_dx(dx, a, residual_ptr, raw_ptr, raw_affine_ptr, dx_ptr, offs_pc, mask_pc, offs_c):
    """From dx of a finished activation a to dz of the raw tensor it was made from.

    Adds the gradient that arrives over the shortcut (residual), undoes the ReLU, and returns dz as
    it will be stored, and dz * (raw - mean), whose sums the BN before needs.
    """
    if residual_ptr is not None:
        dx += tl.load(residual_ptr + offs_pc, mask=mask_pc, other=0.0).to(tl.float32)
    dz = tl.where(a > 0, dx, 0.0).to(dx_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.load(raw_affine_ptr + offs_c)
    raw = tl.load(raw_ptr + offs_pc, mask=mask_pc, other=0.0).to(tl.float32)
    # not a plain product: the compiler would fuse it with the first addition of its sum over the
    # pixels, in which two threads add each other's products. Each would then round another one of
    # them, and whose sum is kept is chance
    return dz, tl.fma(dz, raw - mean[None, :], 0.0)
