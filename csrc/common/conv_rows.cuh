// A convolution warp: 16 output channels of a 3x3 convolution, stride 1, over a stream of rows.
//
// The warp keeps its weights, 9 taps, in registers, and three accumulator rows that rotate: an
// input row y adds to the output rows above (y - 1, through the taps of ky = 2), here (y, ky = 1)
// and below (y + 1, ky = 0). So each input row is read once and there are no halo rows. Behind the
// last row of an image comes a virtual step that multiplies nothing and finishes the last output
// row; what the step after it adds to "above" belongs to no row and is thrown away.
//
// The same warp makes the input gradient: with the taps mirrored and in and out swapped
// (weights.h), that is a convolution too.
#pragma once

#include "common/row_layout.cuh"

namespace cifar_resnet_fast {

// The weights of 16 output channels in fragment order, [ky][kx][16 input channels].
template <int STEPS>
struct WeightFragments {
  uint4 tap[3][3][STEPS];

  // `channels_16`: which 16 output channels
  DEVICE void load(const void* weight, int channels_16) {
    const uint4* first =
        static_cast<const uint4*>(weight) + channels_16 * 9 * STEPS * 32 + (thread_index() & 31);
#pragma unroll
    for (int i = 0; i < 9; ++i) {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        tap[i / 3][i % 3][s] = load_16_bytes_constant(first + (i * STEPS + s) * 32);
      }
    }
  }
};

// 16 pixels by 16 channels: [8 channels of the matrix][register of mma]. Lane (g, t) holds
// channels 4t .. 4t + 3 of the pixels of rows g and g + 8.
struct Tile {
  float v[2][4];

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i / 4][i % 4] = 0.0f;
  }
  // the lane's four channels of row g (half 0) or g + 8 (half 1)
  DEVICE void channels(int half, float (&four)[4]) const {
    four[0] = v[0][2 * half], four[1] = v[0][2 * half + 1];
    four[2] = v[1][2 * half], four[3] = v[1][2 * half + 1];
  }
  template <class T>
  DEVICE void add_product(const uint32_t (&pixels)[4], const uint4& weights) {
    T::multiply_add(v[0], pixels, weights.x, weights.y);
    T::multiply_add(v[1], pixels, weights.z, weights.w);
  }
};

template <class T>
DEVICE uint2 pack_4(const float (&v)[4]) {
  return make_uint2(T::pack(v[0], v[1]), T::pack(v[2], v[3]));
}

// A lane's sums of its four channels, and what becomes of them.
struct ChannelSums {
  float first[4] = {0, 0, 0, 0}, second[4] = {0, 0, 0, 0};

  // over the 8 lanes that share the channels, in a fixed order; then lanes 0 .. 3 put 16 channels'
  // two sums, 32 floats, at `address`
  DEVICE void add_lanes() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask <<= 1) {
        first[i] += shuffle_xor(first[i], mask);
        second[i] += shuffle_xor(second[i], mask);
      }
    }
  }
  DEVICE void store(uint32_t address) const {
    const int lane = thread_index() & 31;
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_shared(address + (lane * 4 + i) * 4, first[i]);
      store_shared(address + (16 + lane * 4 + i) * 4, second[i]);
    }
  }
};
constexpr int kWarpSumBytes = 32 * 4;

// Adds up a finished tile's channels and writes them; `at` is the lane's place in the output.
template <class T>
DEVICE void write_half_tile(const Tile& tile, int half, char* at, bool present,
                            ChannelSums& sums) {
  float v[4];
  tile.channels(half, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums.first[i] += v[i];
    sums.second[i] = fused_multiply_add(v[i], v[i], sums.second[i]);
  }
  if (present) store_8_bytes(at, pack_4<T>(v));
}

// Where a lane finds the fragments of its first tile in a haloed row: by shift for 16 channels
// (-1 .. 2), by kx otherwise.
template <int CHANNELS>
struct FragmentAddresses {
  using Row = HaloRow<CHANNELS, Stage<CHANNELS>::kSize>;
  static constexpr int kCount = CHANNELS == 16 ? 4 : 3;
  uint32_t address[kCount];

  DEVICE FragmentAddresses(uint32_t rows, int first_tile) {
    const int lane = thread_index() & 31, row = lane & 7, half = lane >> 3 & 1, chunk = lane >> 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int image = first_tile, x = row + 8 * half + i - 1;
      if (CHANNELS == 16) x = 4 * row + 2 * half + i - 1;
      if (CHANNELS == 64) image = 2 * first_tile + half, x = row + i - 1;
      address[i] = kept(rows + Row::offset(image, x, chunk));
    }
  }
  DEVICE static uint32_t next_tile(uint32_t a) {
    constexpr int kTileBytes = Row::kImageBytes * Stage<CHANNELS>::kImagesPerTile;
    return Row::template lines_on<kTileBytes / 128>(a);
  }
};

// Evaluation: a finished tile with bias, an optional shortcut's four channels, and ReLU.
template <class T>
DEVICE void write_half_tile(const Tile& tile, int half, char* at, bool present,
                            const float (&bias)[4], uint2 shortcut) {
  float v[4];
  tile.channels(half, v);
  const float added[4] = {T::low(shortcut.x), T::high(shortcut.x), T::low(shortcut.y),
                          T::high(shortcut.y)};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = relu(v[i] + bias[i] + added[i]);
  if (present) store_8_bytes(at, pack_4<T>(v));
}

template <class T, int CHANNELS, int TILES>
struct RowConvolution {
  static constexpr int kSteps = CHANNELS / 16;

  Tile rows[3][TILES];

  // one input row, at `row` bytes from the start of the ring
  DEVICE static void multiply(Tile (&above)[TILES], Tile (&here)[TILES], Tile (&below)[TILES],
                              const FragmentAddresses<CHANNELS>& fragments, uint32_t row,
                              const WeightFragments<kSteps>& weights) {
    if constexpr (CHANNELS == 16) {
      static_assert(TILES == 2);
      uint32_t pixels[4][4];
#pragma unroll
      for (int shift = 0; shift < 4; ++shift) {
        load_matrices(pixels[shift], fragments.address[shift] + row);
      }
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          above[tile].template add_product<T>(pixels[tile + kx], weights.tap[2][kx][0]);
          here[tile].template add_product<T>(pixels[tile + kx], weights.tap[1][kx][0]);
          below[tile].template add_product<T>(pixels[tile + kx], weights.tap[0][kx][0]);
        }
      }
    } else {
      // fragments are loaded one step ahead of the products
      uint32_t pixels[2][TILES][4];
      auto load = [&](int i) {
        uint32_t address =
            HaloRow<CHANNELS, 8>::channels_on(fragments.address[i / kSteps] + row, i % kSteps);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          if (tile > 0) address = FragmentAddresses<CHANNELS>::next_tile(address);
          load_matrices(pixels[i & 1][tile], address);
        }
      };
      load(0);
#pragma unroll
      for (int i = 0; i < 3 * kSteps; ++i) {
        const int kx = i / kSteps, s = i % kSteps;
        if (i + 1 < 3 * kSteps) load(i + 1);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          above[tile].template add_product<T>(pixels[i & 1][tile], weights.tap[2][kx][s]);
          here[tile].template add_product<T>(pixels[i & 1][tile], weights.tap[1][kx][s]);
          below[tile].template add_product<T>(pixels[i & 1][tile], weights.tap[0][kx][s]);
        }
      }
    }
  }

  // Streams `image_groups` times HEIGHT rows. `fetch()` is called before each real row and gives
  // its place in the ring, after the barrier where it begins a step; `finish(tiles, done)` after
  // each row, real or virtual, with the row above, which is complete where `done`.
  template <int HEIGHT, class Fetch, class Finish>
  DEVICE void stream(int image_groups, const FragmentAddresses<CHANNELS>& fragments,
                     const WeightFragments<kSteps>& weights, Fetch fetch, Finish finish) {
#pragma unroll
    for (int i = 0; i < 3 * TILES; ++i) rows[i / TILES][i % TILES].clear();
    const int count = image_groups * (HEIGHT + 1);
    int y = 0;
    for (int first = 0; first < count; first += 3) {
#pragma unroll
      for (int turn = 0; turn < 3; ++turn) {
        if (first + turn < count) {
          Tile(&here)[TILES] = rows[turn];
          Tile(&below)[TILES] = rows[(turn + 1) % 3];
          Tile(&above)[TILES] = rows[(turn + 2) % 3];
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) below[tile].clear();
          if (y < HEIGHT) multiply(above, here, below, fragments, fetch(), weights);
          finish(above, y > 0);
          y = y == HEIGHT ? 0 : y + 1;
        }
      }
    }
  }
};

// Stride 2: an output row y is made of the input rows 2y - 1, 2y and 2y + 1 through the taps of
// ky = 0, 1 and 2. One tile: the 16 pixels of an output row of one image, or of two.
template <class T, int CHANNELS>
struct StridedConvolution {
  using Row = HaloRow<CHANNELS, Stage<CHANNELS>::kSize>;
  static_assert(CHANNELS == 16 || CHANNELS == 32);
  uint32_t fragment[3];  // by kx

  DEVICE explicit StridedConvolution(uint32_t rows) {
    const int lane = thread_index() & 31, row = lane & 7, half = lane >> 3 & 1;
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      const int image = CHANNELS == 16 ? 0 : half, x = CHANNELS == 16 ? row + 8 * half : row;
      fragment[kx] = rows + Row::offset(image, 2 * x + kx - 1, lane >> 4);
    }
  }
  // the input rows 2y and 2y + 1, at so many bytes from the start of the ring, to the output rows
  // y and y + 1
  DEVICE void multiply(Tile& here, Tile& below, uint32_t even_row, uint32_t odd_row,
                       const WeightFragments<CHANNELS / 16>& weights) const {
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
      for (int s = 0; s < CHANNELS / 16; ++s) {
        uint32_t even[4], odd[4];
        load_matrices(even, Row::channels_on(fragment[kx] + even_row, s));
        load_matrices(odd, Row::channels_on(fragment[kx] + odd_row, s));
        here.template add_product<T>(even, weights.tap[1][kx][s]);
        below.template add_product<T>(odd, weights.tap[0][kx][s]);
        here.template add_product<T>(odd, weights.tap[2][kx][s]);
      }
    }
  }
};

}  // namespace cifar_resnet_fast
