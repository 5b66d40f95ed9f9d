// Rows of activations in global and in shared memory.
//
// Every stage has rows of 1024 bytes in global memory: 32 pixels of 16 channels, 16 of 32, 8
// of 64. A row is handled in chunks of 16 bytes (8 channels of one pixel), 64 of them.
#pragma once

#include "common/warp.cuh"

namespace cifar_resnet_fast {

// of a block, on sm_86 and sm_89; sm_80 and sm_90 have more
constexpr int kMaxSharedBytes = 99 * 1024;

constexpr int kRowBytes = 1024;
constexpr int kRowChunks = 64;

template <int CHANNELS>
struct Stage {
  static constexpr int kSize = 512 / CHANNELS;  // height and width
  static constexpr int kImageBytes = kSize * kRowBytes;
  static constexpr int kPixelChunks = CHANNELS / 8;
  // tiles of 16 pixels: a row has 2, 1, or half of one (two images side by side make a tile)
  static constexpr int kImagesPerTile = CHANNELS == 64 ? 2 : 1;
};

// A row in shared memory as the matrix instructions read it: images side by side, each with a zero
// pixel either side, 1280 bytes an image of 1024. Chunks are swizzled within lines of 128 bytes so
// that ldmatrix, which reads the same chunk of 8 neighbouring pixels, meets 8 different banks.
template <int CHANNELS, int WIDTH>
struct HaloRow {
  static constexpr int kMargin = WIDTH / 8;  // pixels either side; only the inner one is read
  static constexpr int kPixels = WIDTH + 2 * kMargin;
  static constexpr int kImageBytes = kPixels * CHANNELS * 2;
  static constexpr int kKeys = CHANNELS == 32 ? 4 : 8;

  // of a chunk of pixel x, -1 .. WIDTH, from the start of the row
  DEVICE static int offset(int image, int x, int chunk) {
    constexpr int kLinePixels = 64 / CHANNELS;
    const int pixel = image * kPixels + x + kMargin;
    const int line = pixel / kLinePixels;
    const int place = pixel % kLinePixels * (CHANNELS / 8) + chunk;
    return line * 128 + ((place ^ (line & (kKeys - 1))) << 4);
  }
  // the address `lines` lines on; only where the key changes by its highest bit or not at all
  template <int LINES>
  DEVICE static uint32_t lines_on(uint32_t address) {
    static_assert(LINES % (kKeys / 2) == 0);
    return (address ^ (LINES % kKeys << 4)) + LINES * 128;  // the sum is an immediate offset
  }
  // the address of the chunk pair `step` further on, from one of the first pair
  DEVICE static uint32_t channels_on(uint32_t address, int step) { return address ^ (step << 5); }
};

// A row of results on its way from the convolution warps (8 bytes at a time) to 16-byte stores.
struct StagingRow {
  DEVICE static int offset(int chunk) {
    const int line = chunk >> 3;
    return line * 128 + (((chunk & 7) ^ ((line & 3) << 1)) << 4);
  }
};

// A tile of the result: 16 pixels by 8 channels in a warp, rows g and g + 8 of the matrix.
//
// Output channels are dealt to the columns of a pair of tiles so that a lane ends up with four
// neighbouring ones, 4t .. 4t + 3 (weights.h puts the weights in that order).
// Pixels: with 16 channels, tile m has pixels 4g + m and 4g + m + 2 of a row, so that the four
// fragments with shifts -1 .. 2 serve three taps of both tiles; with 32 channels g and g + 8; with
// 64 pixel g of two images.
template <int CHANNELS>
DEVICE int tile_pixel(int tile, int half, int lane) {
  const int g = lane >> 2;
  if (CHANNELS == 16) return 4 * g + tile + 2 * half;
  return CHANNELS == 32 ? g + 8 * half : g;
}

// Where the share of one of several groups of warps begins and ends: of `count` parts of the
// batch, such as image groups, each has consecutive ones.
struct Share {
  int first, end;
  DEVICE Share(int count, int group, int groups)
      : first(static_cast<int>(static_cast<long long>(count) * group / groups)),
        end(static_cast<int>(static_cast<long long>(count) * (group + 1) / groups)) {}
  DEVICE int count() const { return end - first; }
  // the part that comes first in an order: STEP 1 from `first` on, STEP -1 from the last one down
  template <int STEP>
  DEVICE int start() const {
    return STEP > 0 ? first : end - 1;
  }
};

// The order of image groups in a kernel. Every second kernel of a pass takes them from the last to
// the first: what the kernel before wrote or read last is still in the L2 cache then.
constexpr int kAscending = 1, kDescending = -1;

DEVICE void load_8_floats(uint32_t address, float (&v)[8]) {
  const uint4 a = load_shared_16_bytes(address), b = load_shared_16_bytes(address + 16);
  v[0] = as_float(a.x), v[1] = as_float(a.y), v[2] = as_float(a.z), v[3] = as_float(a.w);
  v[4] = as_float(b.x), v[5] = as_float(b.y), v[6] = as_float(b.z), v[7] = as_float(b.w);
}

// the four pairs of a chunk, by index
struct Pairs {
  uint32_t v[4];
  DEVICE explicit Pairs(uint4 chunk) : v{chunk.x, chunk.y, chunk.z, chunk.w} {}
  DEVICE uint4 chunk() const { return make_uint4(v[0], v[1], v[2], v[3]); }
};

}  // namespace cifar_resnet_fast
