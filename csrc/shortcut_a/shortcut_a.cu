// CUDA kernel of the option-A shortcut; the maps and the vocabulary are in shortcut_a.cuh.
#include <cuda_runtime.h>

#include <algorithm>

#include "shortcut_a/shortcut_a.cuh"

namespace cifar_resnet_fast {
namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t CHUNKS_PER_THREAD = 4;  // loads in flight before the first store
constexpr uint32_t TILE = THREADS * CHUNKS_PER_THREAD;

// A block fills tiles of TILE consecutive chunks of one image (grid x: tiles, grid y: images);
// neighbouring threads own neighbouring chunks, so stores are whole cache lines.
template <bool BACKWARD, typename Chunk>
__global__ void __launch_bounds__(THREADS)
    shortcut_a_kernel(ShortcutA shape, const Chunk* __restrict__ from, Chunk* __restrict__ to) {
  const uint32_t to_chunks = BACKWARD ? shape.x_chunks() : shape.out_chunks();
  const uint32_t from_chunks = BACKWARD ? shape.out_chunks() : shape.x_chunks();
  for (int64_t n = blockIdx.y; n < shape.N; n += gridDim.y) {
    const Chunk* from_image = from + n * from_chunks;
    Chunk* to_image = to + n * to_chunks;
    const uint32_t first = blockIdx.x * TILE + threadIdx.x;
    Chunk chunk[CHUNKS_PER_THREAD];
#pragma unroll
    for (uint32_t i = 0; i < CHUNKS_PER_THREAD; ++i) {
      const uint32_t u = first + i * THREADS;
      chunk[i] = Chunk{};
      if (u < to_chunks) {
        const uint32_t source = BACKWARD ? chunk_in_out(shape, u) : chunk_in_x(shape, u);
        if (source != NOWHERE) chunk[i] = from_image[source];
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < CHUNKS_PER_THREAD; ++i) {
      const uint32_t u = first + i * THREADS;
      if (u < to_chunks) to_image[u] = chunk[i];
    }
  }
}

template <bool BACKWARD, typename Chunk>
int launch(const ShortcutA& shape, const void* from, void* to, void* stream) {
  const uint32_t to_chunks = BACKWARD ? shape.x_chunks() : shape.out_chunks();
  const dim3 grid((to_chunks + TILE - 1) / TILE,
                  static_cast<unsigned>(std::min<int64_t>(shape.N, 65535)));
  shortcut_a_kernel<BACKWARD, Chunk><<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, static_cast<const Chunk*>(from), static_cast<Chunk*>(to));
  return cudaGetLastError();
}

template <typename Chunk>
int launch(const ShortcutA& shape, bool backward, const void* from, void* to, void* stream) {
  return backward ? launch<true, Chunk>(shape, from, to, stream)
                  : launch<false, Chunk>(shape, from, to, stream);
}

}  // namespace

int launch_shortcut_a(const ShortcutA& shape, bool backward, size_t chunk_bytes, const void* from,
                      void* to, void* stream) {
  switch (chunk_bytes) {
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
