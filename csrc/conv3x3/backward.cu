// The backward kernels and their launches; conv3x3.h says what they compute, backward_geometry.cuh
// how.
#include "common/launch.cuh"
#include "common/shapes.cuh"
#include "conv3x3/backward_dgrad.cuh"
#include "conv3x3/backward_producer.cuh"
#include "conv3x3/backward_wgrad.cuh"

namespace cifar_resnet_fast {
namespace {

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) conv3x3_backward_kernel(BackwardParams p) {
  const Place place = G::place(thread_index() >> 5);
  const int row = block_index() / G::kSplit, rows = G::rows(block_count(), p.batch);
  const bool has_row = row < rows;
  const Share image_groups(has_row ? G::image_groups(p.batch) : 0, row * G::kGroups + place.group,
                           rows * G::kGroups);
  const BackwardBlock block = {image_groups, block_index() % G::kSplit, row, place.group,
                               shared_start() + G::kGroupsAt + place.group * G::kGroupBytes};
  if (place.role == WarpRole::kProducer) {
    produce_backward<G>(p, block, place.index);
  } else if (place.role == WarpRole::kWgrad) {
    wgrad<G>(p, block, place.index);
  } else if constexpr (G::STRIDE == 1) {
    dgrad<G>(p, block, place.index);
  } else {
    dgrad_stride_2<G>(p, block, place.index);
  }
  if (!has_row) return;
  // the block's part of its row of sums, over the warps that summed in order
  for (int i = thread_index(); i < 2 * G::kIn; i += G::kThreads) {
    float sum = 0;
    for (int s = 0; s < G::kSummers; ++s) {
      sum += load_shared_float(shared_start() + G::kSumsAt + s * G::kSummerBytes + i * 4);
    }
    const int which = i / G::kIn, c = block.split * G::kIn + i % G::kIn;
    store_float(p.out_sums + (row * 2 + which) * G::C + c, sum);
  }
  if (G::kGroups > 1) {
    float* slab = p.slabs + static_cast<long long>(row) * G::kSlabElements;
    for (int i = thread_index() * 4; i < G::kSlabElements; i += G::kThreads * 4) {
      store_16_bytes(slab + i, load_shared_16_bytes(shared_start() + G::kGroupsAt + i * 4));
    }
  }
}

template <class T, int C, int STRIDE, bool RESIDUAL>
int launch_backward(const BackwardParams& p, int blocks, bool overlap, void* stream) {
  using G = BackwardGeometry<T, C, STRIDE, RESIDUAL>;
  return launch(conv3x3_backward_kernel<G>, p,
                {(blocks + G::kSplit - 1) / G::kSplit * G::kSplit, G::kThreads, G::kSharedBytes,
                 overlap, stream});
}

}  // namespace

int conv3x3_backward_rows(int channels, int stride, int blocks, int batch) {
  return with_shape(channels, stride, [&](auto shape) {
    // backward_first and backward_second have the same image groups and splits
    using First = BackwardGeometry<BFloat16, shape.kChannels, shape.kStride, true>;
    using Second = BackwardGeometry<BFloat16, shape.kChannels, shape.kStride, false>;
    static_assert(First::kImages == Second::kImages && First::kSplit == Second::kSplit);
    return First::rows(blocks, batch);
  });
}

int conv3x3_backward(const BackwardParams& p, Dtype dtype, int channels, int stride, int blocks,
                     bool overlap, void* stream) {
  return with_shape(channels, stride, [&](auto shape) {
    return with_type(dtype, [&](auto type) -> int {
      using S = decltype(shape);
      using T = decltype(type);
      if (p.residual != nullptr) {
        return launch_backward<T, S::kChannels, S::kStride, true>(p, blocks, overlap, stream);
      }
      if constexpr (S::kStride == 1) {
        return launch_backward<T, S::kChannels, S::kStride, false>(p, blocks, overlap, stream);
      } else {
        return kNoKernel;  // the first convolution of a block, so it has a residual
      }
    });
  });
}

}  // namespace cifar_resnet_fast
