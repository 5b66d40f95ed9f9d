// Launches of the forward convolutions; conv3x3.h says what they compute.
#include "conv3x3_fwd.cuh"
#include "launch.cuh"

namespace cifar_resnet_fast {
namespace {

template <class T, int C, int STRIDE, bool FINISHES>
int launch_forward(const ForwardParams& p, int blocks, bool overlap, void* stream) {
  using G = ForwardGeometry<C, STRIDE, FINISHES>;
  return launch(conv3x3_forward_kernel<T, C, STRIDE, FINISHES>, p,
                {blocks, G::kThreads, G::kSharedBytes, overlap, stream});
}

template <class T>
int launch_forward(const ForwardParams& p, int channels, int stride, int blocks, bool overlap,
                   void* stream) {
  const bool finishes = p.x != nullptr;
  if (stride == 2) {  // the first convolution of a block, so always F1
    if (!finishes) return kBadPointer;
    if (channels == 16) return launch_forward<T, 16, 2, true>(p, blocks, overlap, stream);
    if (channels == 32) return launch_forward<T, 32, 2, true>(p, blocks, overlap, stream);
    return kBadShape;
  }
  if (stride != 1) return kBadShape;
  switch (channels) {
    case 16:
      return finishes ? launch_forward<T, 16, 1, true>(p, blocks, overlap, stream)
                      : launch_forward<T, 16, 1, false>(p, blocks, overlap, stream);
    case 32:
      return finishes ? launch_forward<T, 32, 1, true>(p, blocks, overlap, stream)
                      : launch_forward<T, 32, 1, false>(p, blocks, overlap, stream);
    case 64:
      return finishes ? launch_forward<T, 64, 1, true>(p, blocks, overlap, stream)
                      : launch_forward<T, 64, 1, false>(p, blocks, overlap, stream);
    default:
      return kBadShape;
  }
}

}  // namespace

int conv3x3_forward(const ForwardParams& p, Dtype dtype, int channels, int stride, int blocks,
                    bool overlap, void* stream) {
  if (p.images < 1 || p.images > 65535) return kBadImages;
  if (blocks < 1) return kBadBlocks;
  const ForwardNorm& n = p.norm;
  for (const void* needed :
       {p.y, p.weight, static_cast<const void*>(p.out), static_cast<const void*>(p.out_sums),
        static_cast<const void*>(n.sums), static_cast<const void*>(n.weight),
        static_cast<const void*>(n.bias), static_cast<const void*>(n.running_mean),
        static_cast<const void*>(n.running_var), static_cast<const void*>(n.saved)}) {
    if (needed == nullptr) return kBadPointer;
  }
  if (p.x != nullptr && p.shortcut_kind != Shortcut::kNone && p.shortcut == nullptr) {
    return kBadPointer;
  }
  if (p.shortcut_kind == Shortcut::kOptionA && channels == 16) return kBadShortcut;
  return dtype == Dtype::kFloat16
             ? launch_forward<Float16>(p, channels, stride, blocks, overlap, stream)
             : launch_forward<BFloat16>(p, channels, stride, blocks, overlap, stream);
}

}  // namespace cifar_resnet_fast
