// CUDA kernel of the option-A shortcut; the maps and the vocabulary are in shortcut_a.cuh.
#include <cuda_runtime.h>

#include <algorithm>

#include "shortcut_a/shortcut_a.cuh"

namespace cifar_resnet_fast {
namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t UNITS_PER_THREAD = 4;  // loads in flight before the first store
constexpr uint32_t TILE = THREADS * UNITS_PER_THREAD;

// A block fills tiles of TILE consecutive units of one image (grid x: tiles, grid y: images);
// neighbouring threads own neighbouring units, so stores are whole cache lines.
template <bool BACKWARD, typename Unit>
__global__ void __launch_bounds__(THREADS)
    shortcut_a_kernel(ShortcutA shape, const Unit* __restrict__ from, Unit* __restrict__ to) {
  const uint32_t to_units = BACKWARD ? shape.x_units() : shape.out_units();
  const uint32_t from_units = BACKWARD ? shape.out_units() : shape.x_units();
  for (int64_t n = blockIdx.y; n < shape.N; n += gridDim.y) {
    const Unit* from_image = from + n * from_units;
    Unit* to_image = to + n * to_units;
    const uint32_t first = blockIdx.x * TILE + threadIdx.x;
    Unit unit[UNITS_PER_THREAD];
#pragma unroll
    for (uint32_t i = 0; i < UNITS_PER_THREAD; ++i) {
      const uint32_t u = first + i * THREADS;
      unit[i] = Unit{};
      if (u < to_units) {
        const uint32_t source = BACKWARD ? unit_in_out(shape, u) : unit_in_x(shape, u);
        if (source != NOWHERE) unit[i] = from_image[source];
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < UNITS_PER_THREAD; ++i) {
      const uint32_t u = first + i * THREADS;
      if (u < to_units) to_image[u] = unit[i];
    }
  }
}

template <bool BACKWARD, typename Unit>
int launch(const ShortcutA& shape, const void* from, void* to, void* stream) {
  const uint32_t to_units = BACKWARD ? shape.x_units() : shape.out_units();
  const dim3 grid((to_units + TILE - 1) / TILE,
                  static_cast<unsigned>(std::min<int64_t>(shape.N, 65535)));
  shortcut_a_kernel<BACKWARD, Unit><<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, static_cast<const Unit*>(from), static_cast<Unit*>(to));
  return cudaGetLastError();
}

template <typename Unit>
int launch(const ShortcutA& shape, bool backward, const void* from, void* to, void* stream) {
  return backward ? launch<true, Unit>(shape, from, to, stream)
                  : launch<false, Unit>(shape, from, to, stream);
}

}  // namespace

int launch_shortcut_a(const ShortcutA& shape, bool backward, size_t unit_bytes, const void* from,
                      void* to, void* stream) {
  switch (unit_bytes) {
    case 2:
      return launch<uint16_t>(shape, backward, from, to, stream);
    case 4:
      return launch<uint32_t>(shape, backward, from, to, stream);
    case 8:
      return launch<uint2>(shape, backward, from, to, stream);
    case 16:
      return launch<uint4>(shape, backward, from, to, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cifar_resnet_fast
