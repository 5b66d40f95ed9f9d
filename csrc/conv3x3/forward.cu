// The forward kernels and their launches; conv3x3.h says what they compute, forward.cuh how.
#include "common/launch.cuh"
#include "common/shapes.cuh"
#include "conv3x3/forward.cuh"

namespace cifar_resnet_fast {
namespace {

template <class T, int C, int STRIDE, bool FINISHES>
__global__ void __launch_bounds__((ForwardGeometry<C, STRIDE, FINISHES>::kThreads), 1)
    conv3x3_forward_kernel(ForwardParams p) {
  using G = ForwardGeometry<C, STRIDE, FINISHES>;
  constexpr int kConvolvers = G::kConfig.groups * G::kConvolvers;
  const int warp = thread_index() >> 5;
  const bool produces = warp >= kConvolvers;
  const int role_warps = produces ? G::kConfig.producers : G::kConvolvers;
  const int warp_of_role = produces ? warp - kConvolvers : warp;
  const int group = warp_of_role / role_warps, index = warp_of_role % role_warps;
  const uint32_t halo = shared_start() + G::kGroupsAt + group * G::kGroupBytes;
  const Share image_groups((p.batch + G::kImages - 1) / G::kImages,
                           block_index() * G::kConfig.groups + group,
                           block_count() * G::kConfig.groups);
  if (produces) {
    wait_for_kernel_before();
    produce_rows<T, G, C, FINISHES>(p, image_groups, group, index, halo);
  } else if constexpr (STRIDE == 1) {
    convolve_rows<T, G, C>(p, image_groups, group, index, halo);
  } else {
    convolve_rows_stride_2<T, G, C>(p, image_groups, group, index, halo);
  }
  // the block's row of sums, over its groups in order
  for (int i = thread_index(); i < 2 * G::kOut; i += G::kThreads) {
    const int which = i / G::kOut, c = i % G::kOut;
    float sum = 0;
    for (int g = 0; g < G::kConfig.groups; ++g) {
      sum += load_shared_float(shared_start() + G::kGroupsAt +
                               (g * G::kConvolvers + c / 16) * kWarpSumBytes +
                               (which * 16 + c % 16) * 4);
    }
    store_float(p.out_sums + block_index() * 2 * G::kOut + i, sum);
  }
}

template <class T, int C, int STRIDE, bool FINISHES>
int launch_forward(const ForwardParams& p, int blocks, bool overlap, void* stream) {
  using G = ForwardGeometry<C, STRIDE, FINISHES>;
  return launch(conv3x3_forward_kernel<T, C, STRIDE, FINISHES>, p,
                {blocks, G::kThreads, G::kSharedBytes, overlap, stream});
}

}  // namespace

int conv3x3_forward(const ForwardParams& p, Dtype dtype, int channels, int stride, int blocks,
                    bool overlap, void* stream) {
  return with_shape(channels, stride, [&](auto shape) {
    return with_type(dtype, [&](auto type) -> int {
      using S = decltype(shape);
      using T = decltype(type);
      if (p.x != nullptr) {
        return launch_forward<T, S::kChannels, S::kStride, true>(p, blocks, overlap, stream);
      }
      if constexpr (S::kStride == 1) {
        return launch_forward<T, S::kChannels, S::kStride, false>(p, blocks, overlap, stream);
      } else {
        return kNoKernel;  // the first convolution of a block, so it finishes x
      }
    });
  });
}

}  // namespace cifar_resnet_fast
