// CUDA kernel of the option-A shortcut; the maps and the vocabulary are in shortcut_a.cuh.
#include <algorithm>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "shortcut_a/shortcut_a.cuh"

namespace cifar_resnet_fast {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kThreadChunks = 4;  // loads in flight before the first store
constexpr uint32_t kTile = kThreads * kThreadChunks;

// A block fills tiles of kTile consecutive chunks of one image (blocks: tiles, rows of blocks:
// images); neighbouring threads own neighbouring chunks, so stores are whole cache lines.
template <bool BACKWARD, class Chunk>
__global__ void __launch_bounds__(kThreads) shortcut_a_kernel(ShortcutAParams p) {
  const ShortcutA& shape = p.shape;
  const auto* from = static_cast<const Chunk*>(p.from);
  auto* to = static_cast<Chunk*>(p.to);
  const uint32_t to_chunks = BACKWARD ? shape.x_chunks() : shape.out_chunks();
  const uint32_t from_chunks = BACKWARD ? shape.out_chunks() : shape.x_chunks();
  for (int64_t n = block_row(); n < shape.N; n += block_rows()) {
    const Chunk* from_image = from + n * from_chunks;
    Chunk* to_image = to + n * to_chunks;
    const uint32_t first = block_index() * kTile + thread_index();
    Chunk chunk[kThreadChunks];
#pragma unroll
    for (uint32_t i = 0; i < kThreadChunks; ++i) {
      const uint32_t u = first + i * kThreads;
      chunk[i] = Chunk{};
      if (u < to_chunks) {
        const uint32_t source = BACKWARD ? chunk_in_out(shape, u) : chunk_in_x(shape, u);
        if (source != kNowhere) chunk[i] = load_read_only(from_image + source);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kThreadChunks; ++i) {
      const uint32_t u = first + i * kThreads;
      if (u < to_chunks) store(to_image + u, chunk[i]);
    }
  }
}

template <class Chunk>
int launch_for(const ShortcutAParams& p, bool backward, void* stream) {
  const uint32_t chunks = backward ? p.shape.x_chunks() : p.shape.out_chunks();
  const int tiles = static_cast<int>((chunks + kTile - 1) / kTile);
  const int rows = static_cast<int>(std::min<int64_t>(p.shape.N, 65535));
  const LaunchShape shape = {tiles, kThreads, 0, false, stream, rows};
  return backward ? launch(shortcut_a_kernel<true, Chunk>, p, shape)
                  : launch(shortcut_a_kernel<false, Chunk>, p, shape);
}

}  // namespace

int launch_shortcut_a(const ShortcutAParams& p, bool backward, size_t chunk_bytes, void* stream) {
  switch (chunk_bytes) {
    case 2:
      return launch_for<uint16_t>(p, backward, stream);
    case 4:
      return launch_for<uint32_t>(p, backward, stream);
    case 8:
      return launch_for<uint2>(p, backward, stream);
    default:
      return launch_for<uint4>(p, backward, stream);
  }
}

}  // namespace cifar_resnet_fast
