// The end of a stage's first block, relu(scale * y + shift + shortcut_a(x)), and its backward:
// arithmetic, parameters and launchers. Torch-free; vocabulary and index maps: shortcut_a.cuh.
#pragma once

#include "shortcut_a/shortcut_a.cuh"

namespace cifar_resnet_fast {

enum class ElementType { float16, bfloat16, float32, float64 };

// y, out, dout, dy: [N, Ho, Wo, K]; x, dx: [N, H, W, C]; all of one dtype. scale, shift, dscale,
// dshift: [K], float32, or float64 where the activations are.
struct StageBorderForward {
  ShortcutA shape;
  const void *y, *scale, *shift, *x;
  void* out;
};

struct StageBorderBackward {
  ShortcutA shape;
  const void *dout, *out, *y, *scale;
  void *dy, *dscale, *dshift, *dx;
  void* partial_sums;  // [blocks of stage_border_grid, 2, K], of scale's dtype
};

// Rounded after every step, as PyTorch's own operations are: bit-identical to the reference.
template <typename Real>
HOST_DEVICE Real stage_border_value(Real scale, Real y, Real shift, Real shortcut) {
#ifdef __CUDA_ARCH__
  Real z;  // the compiler may not contract these into a fused multiply-add
  if constexpr (sizeof(Real) == 4) {
    z = __fadd_rn(__fadd_rn(__fmul_rn(scale, y), shift), shortcut);
  } else {
    z = __dadd_rn(__dadd_rn(__dmul_rn(scale, y), shift), shortcut);
  }
#else
  const Real scaled = scale * y;  // built with -ffp-contract=off
  const Real z = scaled + shift + shortcut;
#endif
  return z <= Real(0) ? Real(0) : z;  // NaN stays NaN
}

// Gradient before the ReLU, whose mask the stored output gives; NaN passes, as in PyTorch.
template <typename Real>
HOST_DEVICE Real stage_border_dz(Real dout, Real out) {
  return out <= Real(0) ? Real(0) : dout;
}

// Both return a cudaError_t; chunk_bytes is 16 or the dtype's size.
int launch_stage_border_forward(const StageBorderForward& p, ElementType type, size_t chunk_bytes,
                                void* stream);
int launch_stage_border_backward(const StageBorderBackward& p, ElementType type,
                                 size_t chunk_bytes, void* stream);

// The backward's grid: some images by some parts of an image. It depends on the shape alone, so
// the order of the sums, and with it every bit of them, is the same on every card.
struct BlockGrid {
  uint32_t images, parts;
};
BlockGrid stage_border_grid(const ShortcutA& shape);

}  // namespace cifar_resnet_fast
