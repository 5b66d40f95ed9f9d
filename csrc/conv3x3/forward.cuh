// Forward 3x3 convolutions (forward_first and forward_second of conv3x3.h) that stream rows.
//
// An *image group* is an image, or a few side by side, that are streamed together, row by row. A
// *group* of warps streams whole image groups; a block has one or more groups and meets only
// before and after.
//   Producer warps bring raw rows into a ring of shared memory, each lane its own 16-byte chunks
//     for itself (cp.async, several steps ahead). Once a chunk is there, the lane applies scale,
//     shift, shortcut and ReLU in registers and writes it into a haloed row, and in
//     forward_first to x.
//   Convolution warps make 16 output channels each from the haloed rows (conv_rows.cuh), and
//     write raw rows straight from registers: 8 bytes a lane, full 32-byte sectors.
// A *step* is one or two rows. There are haloed rows for two steps: while the convolution warps
// read one step's, the producers write the next step's. One named barrier a step orders both: at
// barrier k the rows of step k are complete, and those of step k - 1, whose place step k + 1
// takes, have been read.
//
// The first loads are on their way before the coefficients are made from the sums of the kernel
// before, so that making them costs little. Images that are missing in the last image group are
// not loaded or stored; their haloed rows are zeros, so they add nothing to the sums.
#pragma once

#include "common/conv_rows.cuh"
#include "common/norm.cuh"
#include "conv3x3/conv3x3.h"

namespace cifar_resnet_fast {

struct ForwardConfig {
  int groups;      // in a block
  int step_rows;   // between two barriers
  int ring_steps;  // of raw rows that are on their way
  int producers;   // warps of a group
  int images;      // of an image group
};

// One H100, batch 1024, bfloat16, measured on prototypes of these kernels (2026-11); first /
// second in microseconds, and their floor: bytes at 3.0 TB/s.
template <int C, int STRIDE>
constexpr ForwardConfig forward_config() {
  if (STRIDE == 2) {
    return C == 16 ? ForwardConfig{4, 2, 3, 1, 1}   // 44.7 / -  (39.1 / -)
                   : ForwardConfig{2, 2, 2, 2, 2};  // 24.0 / -  (19.6 / -)
  }
  return C == 16   ? ForwardConfig{8, 1, 4, 1, 1}   // 52.6 / 27.9  (44.7 / 22.4)
         : C == 32 ? ForwardConfig{4, 2, 3, 1, 1}   // 27.7 / 17.3  (22.4 / 11.2)
                   : ForwardConfig{1, 1, 4, 4, 4};  // 17.4 / 15.6  (11.2 / 8.1, by the mma)
}

// FINISHES: forward_first, which writes the finished activation x
template <int C, int STRIDE, bool FINISHES>
struct ForwardGeometry {
  static constexpr ForwardConfig kConfig = forward_config<C, STRIDE>();
  using Row = HaloRow<C, Stage<C>::kSize>;
  static constexpr int kImageGroupStep = FINISHES ? kDescending : kAscending;
  static constexpr int kImages = kConfig.images;
  static constexpr int kOut = C * STRIDE;  // output channels
  static constexpr int kConvolvers = kOut / 16;
  static constexpr int kGroupWarps = kConvolvers + kConfig.producers;
  static constexpr int kWarps = kGroupWarps * kConfig.groups;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStepRows = kConfig.step_rows;

  // a producer lane has so many chunks of each row, kChunkStride bytes apart in the ring
  static constexpr int kChunks = kImages * kRowChunks / (kConfig.producers * 32);
  static constexpr int kChunkStride = kConfig.producers * 512;
  static constexpr int kRawRowBytes = (FINISHES ? 2 : 1) * kChunks * kChunkStride;
  static constexpr int kHaloRowBytes = kImages * Row::kImageBytes;
  static constexpr int kHaloBytes = 2 * kStepRows * kHaloRowBytes;
  static constexpr int kGroupBytes = kHaloBytes + kConfig.ring_steps * kStepRows * kRawRowBytes;

  // shared memory: coefficients, groups (later the warps' sums), scratch of the merge
  static constexpr int kGroupsAt = (2 * C * 4 + 127) / 128 * 128;
  static constexpr int kScratchAt = kGroupsAt + kConfig.groups * kGroupBytes;
  static constexpr int kSharedBytes = kScratchAt + merge_bytes<C, kThreads>();
  static_assert(kConfig.groups * kConvolvers * kWarpSumBytes <= kConfig.groups * kGroupBytes);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kConfig.groups <= 15, "named barriers");
};

// Coefficients from the sums, and zeroed haloed rows; every warp of the block calls it once.
template <class G, int C>
DEVICE void begin_forward(const ForwardParams& p, uint32_t halo, int warp_of_group) {
  const uint32_t start = shared_start();
  const double count = static_cast<double>(p.batch) * Stage<C>::kSize * Stage<C>::kSize;
  forward_coefficients<C, G::kThreads>(p.bn, count, start, start + G::kScratchAt);
  const int lane = thread_index() & 31;
  for (int i = (warp_of_group * 32 + lane) * 16; i < G::kHaloBytes; i += G::kGroupWarps * 512) {
    store_shared(halo + i, make_uint4(0, 0, 0, 0));
  }
  let_next_kernel_start();
  block_barrier();  // coefficients and zeros are there
}

template <class T, class G, int C, bool FINISHES>
DEVICE void produce_rows(const ForwardParams& p, const Share& image_groups, int group, int index,
                         uint32_t halo) {
  constexpr int kSize = Stage<C>::kSize, kChunks = G::kChunks, kStepRows = G::kStepRows;
  constexpr int kRingSteps = G::kConfig.ring_steps;
  constexpr int kImageGroupBytes = G::kImages * Stage<C>::kImageBytes;
  const int lane = thread_index() & 31, position = index * 32 + lane;
  const uint32_t ring = halo + G::kHaloBytes + position * 16;
  const int chunk_of_pixel = position % (C / 8);

  // The lane's chunks are the same distances apart in every lane: whole rows, or parts of one row.
  constexpr int kLanes = G::kConfig.producers * 32;
  static_assert(kLanes % kRowChunks == 0 || kRowChunks % kLanes == 0);
  auto image = [&](int j) { return position / kRowChunks + j * kLanes / kRowChunks; };
  auto distance = [&](int j, int image_bytes) {
    return j * kLanes / kRowChunks * image_bytes + j * kLanes % kRowChunks * 16;
  };
  const int first_x = position % kRowChunks / (C / 8);
  const int from = kept(image(0) * Stage<C>::kImageBytes + position % kRowChunks * 16);
  // option A: new channels, half of them in front, are zero; the others are two channels' worth of
  // bytes a pixel of the larger image, every second pixel of it
  const bool option_a = FINISHES && C > 16 && p.shortcut_kind == Shortcut::kOptionA;
  const bool has_shortcut =
      FINISHES && p.shortcut_kind != Shortcut::kNone &&
      (!option_a || (chunk_of_pixel >= C / 32 && chunk_of_pixel < C / 32 + C / 16));
  const int shortcut_scale = option_a ? 2 : 1;  // bytes of a row and of an image
  const int shortcut_from = option_a ? image(0) * 2 * Stage<C>::kImageBytes + 2 * first_x * C +
                                           (chunk_of_pixel - C / 32) * 16
                                     : from;
  uint32_t to[kChunks];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const int x = first_x + j * kLanes % kRowChunks / (C / 8);
    to[j] = kept(halo + G::Row::offset(image(j), x, chunk_of_pixel));
  }
  auto present = [&](int image_group, int j) {
    return G::kImages == 1 || image_group * G::kImages + image(j) < p.batch;
  };

  // loads: the next step's rows into the ring; one group of copies a step, empty behind the end
  int load_group = image_groups.start<G::kImageGroupStep>(), loads_left = image_groups.count();
  int load_y = 0, load_slot = 0;
  auto load_step = [&] {
    if (loads_left > 0) {
      const int row = load_group * kImageGroupBytes + load_y * kRowBytes;
      const char* y = static_cast<const char*>(p.y) + (row + from);
      const char* shortcut =
          static_cast<const char*>(p.shortcut) + (row * shortcut_scale + shortcut_from);
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const uint32_t slot = ring + (load_slot * kStepRows + r) * G::kRawRowBytes;
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          copy_16_bytes_async<true>(slot + j * G::kChunkStride,
                                    y + r * kRowBytes + distance(j, Stage<C>::kImageBytes),
                                    present(load_group, j));
          if (FINISHES) {
            copy_16_bytes_async<true>(slot + (kChunks + j) * G::kChunkStride,
                                      shortcut + r * kRowBytes * shortcut_scale +
                                          distance(j, Stage<C>::kImageBytes * shortcut_scale),
                                      has_shortcut && present(load_group, j));
          }
        }
      }
      load_y += kStepRows;
      if (load_y == kSize) load_y = 0, --loads_left, load_group += G::kImageGroupStep;
    }
    commit_copies();
    load_slot = load_slot + 1 == kRingSteps ? 0 : load_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kRingSteps; ++i) load_step();

  begin_forward<G, C>(p, halo, G::kConvolvers + index);
  float scale[8], shift[8];
  load_8_floats(shared_start() + chunk_of_pixel * 32, scale);
  load_8_floats(shared_start() + C * 4 + chunk_of_pixel * 32, shift);

  int slot = 0, half = 0, image_group = image_groups.start<G::kImageGroupStep>();
  for (int left = image_groups.count(); left > 0; --left, image_group += G::kImageGroupStep) {
#pragma unroll 1
    for (int y = 0; y < kSize; y += kStepRows) {
      char* x = static_cast<char*>(p.x) + (image_group * kImageGroupBytes + y * kRowBytes + from);
      wait_for_copies<kRingSteps - 1>();
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const uint32_t raw = ring + (slot * kStepRows + r) * G::kRawRowBytes;
        uint4 y_chunk[kChunks], shortcut_chunk[kChunks];
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          y_chunk[j] = load_shared_16_bytes(raw + j * G::kChunkStride);
          if (FINISHES) {
            shortcut_chunk[j] = load_shared_16_bytes(raw + (kChunks + j) * G::kChunkStride);
          }
        }
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          Pairs a(y_chunk[j]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float low = fused_multiply_add(scale[2 * i], T::low(a.v[i]), shift[2 * i]);
            float high = fused_multiply_add(scale[2 * i + 1], T::high(a.v[i]), shift[2 * i + 1]);
            if (FINISHES) {
              const Pairs s(shortcut_chunk[j]);
              low += T::low(s.v[i]);
              high += T::high(s.v[i]);
            }
            a.v[i] = T::pack(relu(low), relu(high));
          }
          const uint32_t row = to[j] + (half * kStepRows + r) * G::kHaloRowBytes;
          store_shared(row, a.chunk());
          if (!present(image_group, j)) store_shared(row, make_uint4(0, 0, 0, 0));
          if (FINISHES && present(image_group, j)) {
            store_16_bytes(x + r * kRowBytes + distance(j, Stage<C>::kImageBytes), a.chunk());
          }
        }
      }
      load_step();
      slot = slot + 1 == kRingSteps ? 0 : slot + 1;
      half ^= 1;
      group_barrier<G::kGroupWarps>(group + 1);  // this step's rows are there
    }
  }
  block_barrier();  // every group is through: its memory is free
  block_barrier();  // the warps' sums are there
}

template <class G>
DEVICE void finish_convolver(ChannelSums& sums, int convolver) {
  sums.add_lanes();
  block_barrier();  // every group is through: its memory is free
  sums.store(shared_start() + G::kGroupsAt + convolver * kWarpSumBytes);
  block_barrier();  // the warps' sums are there
}

// Stride 1: TILES tiles of 16 pixels a row, rows rotating as conv_rows.cuh says.
template <class T, class G, int C>
DEVICE void convolve_rows(const ForwardParams& p, const Share& image_groups, int group, int index,
                          uint32_t halo) {
  constexpr int kTiles = C == 16 ? 2 : G::kImages / Stage<C>::kImagesPerTile;
  constexpr int kImageGroupBytes = G::kImages * Stage<C>::kImageBytes;
  WeightFragments<C / 16> weights;
  weights.load(p.fragments, index);
  wait_for_kernel_before();
  begin_forward<G, C>(p, halo, index);

  const FragmentAddresses<C> fragments(halo, 0);
  const int lane = thread_index() & 31;
  auto image_of = [&](int tile, int half) {
    return C == 16 ? 0 : C == 32 ? tile : 2 * tile + half;
  };
  // half tiles are the same distances apart in every lane
  auto distance = [&](int tile, int half) {
    return image_of(tile, half) * Stage<C>::kImageBytes + tile_pixel<C>(tile, half, 0) * C * 2;
  };
  char* out = static_cast<char*>(p.out) +
              kept(image_groups.start<G::kImageGroupStep>() * kImageGroupBytes +
                   tile_pixel<C>(0, 0, lane) * C * 2 + index * 32 + (lane & 3) * 8);
  ChannelSums sums;
  int row_of_step = 0, ring_row = 0;
  auto fetch = [&]() -> uint32_t {
    if (row_of_step == 0) group_barrier<G::kGroupWarps>(group + 1);  // this step's rows are there
    row_of_step = (row_of_step + 1) % G::kStepRows;
    const uint32_t row = ring_row * G::kHaloRowBytes;
    ring_row = (ring_row + 1) % (2 * G::kStepRows);
    return row;
  };
  int out_group = image_groups.start<G::kImageGroupStep>(), out_y = 0;
  auto write_row = [&](const Tile(&row)[kTiles], bool done) {
    if (!done) return;
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const int image = out_group * G::kImages + image_of(i / 2, i % 2);
      write_half_tile<T>(row[i / 2], i % 2, out + distance(i / 2, i % 2),
                         G::kImages == 1 || image < p.batch, sums);
    }
    out += kRowBytes;
    if (++out_y == Stage<C>::kSize) {
      out_y = 0, out_group += G::kImageGroupStep;
      out += G::kImageGroupStep * kImageGroupBytes - Stage<C>::kImageBytes;
    }
  };
  RowConvolution<T, C, kTiles> convolution;
  convolution.template stream<Stage<C>::kSize>(image_groups.count(), fragments, weights, fetch,
                                               write_row);
  finish_convolver<G>(sums, group * G::kConvolvers + index);
}

// Stride 2: a step is the rows 2y and 2y + 1 of the input.
template <class T, class G, int C>
DEVICE void convolve_rows_stride_2(const ForwardParams& p, const Share& image_groups, int group,
                                   int index, uint32_t halo) {
  constexpr int kOutSize = Stage<C>::kSize / 2;
  using Out = Stage<2 * C>;
  WeightFragments<C / 16> weights;
  weights.load(p.fragments, index);
  wait_for_kernel_before();
  begin_forward<G, C>(p, halo, index);

  const StridedConvolution<T, C> convolution(halo);
  const int lane = thread_index() & 31;
  char* out = static_cast<char*>(p.out) +
              kept(tile_pixel<2 * C>(0, 0, lane) * C * 4 + index * 32 + (lane & 3) * 8);
  ChannelSums sums;
  Tile here, below;
  uint32_t step = 0;
  int image_group = image_groups.start<G::kImageGroupStep>();
  for (int left = image_groups.count(); left > 0; --left, image_group += G::kImageGroupStep) {
    here.clear();
#pragma unroll 1
    for (int y = 0; y < kOutSize; ++y) {
      group_barrier<G::kGroupWarps>(group + 1);  // this step's rows are there
      below.clear();
      convolution.multiply(here, below, step, step + G::kHaloRowBytes, weights);
      char* row = out + (image_group * G::kImages * Out::kImageBytes + y * kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int image = C == 16 ? 0 : half;
        const int distance = image * Out::kImageBytes + tile_pixel<2 * C>(0, half, 0) * C * 4;
        write_half_tile<T>(here, half, row + distance,
                           G::kImages == 1 || image_group * G::kImages + image < p.batch, sums);
      }
      here = below;
      step ^= 2 * G::kHaloRowBytes;
    }
  }
  finish_convolver<G>(sums, group * G::kConvolvers + index);
}

}  // namespace cifar_resnet_fast
