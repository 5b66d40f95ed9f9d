// Backward 3x3 convolutions (backward_first and backward_second of conv3x3.h): who works on what,
// and where it lies.
//
// As in the forward kernels an *image group* is an image or a few side by side, and a *group* of
// warps streams whole image groups. One kernel makes both gradients, because both need the same
// rows of dy and a.
//   Producer warps bring raw rows of dz, y and the input (cp.async rings, lane-private), and turn
//     them into haloed rows of dy and of a = the convolution's finished input.
//   Dgrad warps make 16 input channels each from the rows of dy, weights in registers.
//   Wgrad warps keep a part of dweight in registers, 16 input and 16 or 32 output
//     channels for all 9 taps, and add to it from the rows of dy and a.
// What is behind dgrad (residual, mask by a > 0, sums, store) is done
//   directly, with 16 channels, by the dgrad warps from registers, the other tensors by
//     lane-private 8-byte copies;
//   staged, otherwise: the warps put their rows, rounded, into a staging ring, and the producers
//     finish them with 16-byte accesses, three steps behind the rows they produce.
// A *step* is so many rows of dy and the same rows of a; at stride 2 twice as many rows of a. One
// named barrier a step: at barrier k, dy and a of step k are complete; the dy of step k - 1 has
// been read; a, which wgrad reads one row late and the mask three steps late, and
// staging have rings of four steps.
//
// With 64 channels the registers of one block do not hold the weights and dweight: two
// neighbouring blocks work on the same image groups, each on half of the input channels. Both make
// all of dy; the second read of dz and y finds them in L2. They share a row of sums and a slab.
#pragma once

#include "common/conv_rows.cuh"
#include "common/norm.cuh"
#include "common/slabs.cuh"
#include "conv3x3/conv3x3.h"

namespace cifar_resnet_fast {

struct BackwardConfig {
  int groups;            // in a block
  int step_rows;         // of dy between two barriers
  int ring_steps;        // of raw rows that are on their way
  int side_rows;         // of the direct form's other tensors that are on their way
  int producers;         // warps of a group
  int wgrad_warps;       // wgrad warps of a group
  int images;            // of an image group
  int tiles_per_warp;    // of an dgrad warp
  int columns_per_warp;  // blocks of 16 output channels of a wgrad warp
};

// One H100, batch 1024, bfloat16, measured on prototypes of these kernels (2026-11); first /
// second in microseconds, and their floor: bytes at 3.0 TB/s, or (*) the tensor cores. Stride 2 is
// unmeasured.
template <int C, int STRIDE, bool RESIDUAL>
constexpr BackwardConfig backward_config() {
  if (STRIDE == 2) {
    return C == 16 ? BackwardConfig{2, 1, 3, 0, 1, 2, 1, 1, 1}
                   : BackwardConfig{1, 1, 3, 0, 2, 4, 2, 1, 2};
  }
  return C == 16 ? BackwardConfig{4, 1, 3, RESIDUAL ? 3 : 4, 1, 1, 1, 2, 1}
         // 79.4 / 56.0  (67.1 / 44.7)
         : C == 32 ? BackwardConfig{1, 1, 4, 0, 4, 4, 2, 1, 1}   // 41.5 / 38.0  (33.6 / 22.4)
                   : BackwardConfig{1, 1, 3, 0, 2, 4, 4, 2, 2};  // 38.5 / 38.8  (16.8 / 16.2*)
}

enum class WarpRole { kProducer, kDgrad, kWgrad };

// What a warp is.
struct Place {
  WarpRole role;
  int group;
  int index;  // among the warps of this role in its group
};

template <class T16, int C_, int STRIDE_, bool RESIDUAL>
struct BackwardGeometry {
  using T = T16;
  static constexpr int C = C_, STRIDE = STRIDE_, K = C * STRIDE;
  static constexpr bool kResidual = RESIDUAL;  // backward_first
  static constexpr BackwardConfig kConfig = backward_config<C, STRIDE, RESIDUAL>();
  static constexpr int kSplit = C == 64 ? 2 : 1;  // blocks that share an image group
  static constexpr int kIn = C / kSplit;          // input channels of a block
  static constexpr bool kStaged = C > 16 || STRIDE == 2;
  static constexpr int kSize = Stage<C>::kSize, kDySize = Stage<K>::kSize;
  static constexpr int kImages = kConfig.images;
  HOST_DEVICE static int image_groups(int batch) { return (batch + kImages - 1) / kImages; }
  // of sums and slabs; none is without an image group
  HOST_DEVICE static int rows(int blocks, int batch) {
    const int most = (blocks + kSplit - 1) / kSplit;
    return most < image_groups(batch) ? most : image_groups(batch);
  }
  static constexpr int kImageGroupStep = RESIDUAL ? kAscending : kDescending;
  using DyRow = HaloRow<K, kDySize>;
  using ARow = HaloRow<kIn, kSize>;

  static constexpr int kTiles = K == 16 ? 2 : kImages / Stage<K>::kImagesPerTile;
  static constexpr int kTileShares = kTiles / kConfig.tiles_per_warp;
  static constexpr int kDgradWarps = kIn / 16 * kTileShares;
  static constexpr int kWgradWarps = kConfig.wgrad_warps;
  static_assert(kWgradWarps * kConfig.columns_per_warp == kIn / 16 * (K / 16));
  static constexpr int kGroupWarps = kDgradWarps + kWgradWarps + kConfig.producers;
  static constexpr int kGroups = kConfig.groups, kWarps = kGroupWarps * kGroups;
  static constexpr int kThreads = kWarps * 32;

  // rows of a step, and of the rings
  static constexpr int kDyRows = kConfig.step_rows, kARows = kDyRows * STRIDE;
  static constexpr int kDyRing = 2 * kDyRows, kARing = kStaged ? 4 * kARows : 2 * kARows + 2;
  static constexpr int kDyRowBytes = kImages * DyRow::kImageBytes;
  static constexpr int kARowBytes = kImages * ARow::kImageBytes;
  static constexpr int kStagingRowBytes = kStaged ? kImages * kRowBytes / kSplit : 0;

  // a producer lane's chunks of a row of dy and of a, and its slots in a step of the raw ring
  static constexpr int kProducerLanes = kConfig.producers * 32;
  static constexpr int kDyChunks = kImages * kRowChunks / kProducerLanes;
  static constexpr int kAChunks = kImages * kRowChunks / kSplit / kProducerLanes;
  static constexpr int kSlotStride = kProducerLanes * 16;
  static constexpr int kDzSlot = 0, kYSlot = kDzSlot + kDyRows * kDyChunks;
  static constexpr int kInputSlot = kYSlot + kDyRows * kDyChunks;
  static constexpr int kSumsSlot = kInputSlot + kARows * kAChunks;
  static constexpr int kResidualSlot = kSumsSlot + (kStaged ? kARows * kAChunks : 0);
  // option A's residual has only every second row
  static constexpr int kResidualRows = kStaged && RESIDUAL ? kDyRows : 0;
  static constexpr int kRawStepBytes = (kResidualSlot + kResidualRows * kAChunks) * kSlotStride;

  // the direct form's ring: of each dgrad warp, 8 bytes a lane for each half of a tile
  static constexpr int kSideTensors = kStaged ? 0 : RESIDUAL ? 2 : 1;
  static constexpr int kSideRowBytes = kSideTensors * kConfig.tiles_per_warp * 2 * 256;
  static constexpr int kSideBytes = kConfig.side_rows * kSideRowBytes;

  static constexpr int kDyAt = 0, kAAt = kDyAt + kDyRing * kDyRowBytes;
  static constexpr int kStagingAt = kAAt + kARing * kARowBytes;
  static constexpr int kRawAt = kStagingAt + 4 * kARows * kStagingRowBytes;
  static constexpr int kSideAt = kRawAt + kConfig.ring_steps * kRawStepBytes;
  static constexpr int kGroupBytes = kSideAt + kDgradWarps * kSideBytes;

  // shared memory: coefficients A, B, C [K] and in backward_second scale, shift [C]; groups, and
  // when they are through, where there are several, dweight, then the warps' sums; scratch of the
  // merge
  static constexpr int kSlabElements = 9 * C * K;
  static constexpr int kScaleAt = 3 * K * 4;
  static constexpr int kGroupsAt = (kScaleAt + 2 * C * 4 + 127) / 128 * 128;
  static constexpr int kSumsAt = kGroupsAt + (kGroups > 1 ? kSlabElements * 4 : 0);
  static constexpr int kSummers = kGroups * (kStaged ? kConfig.producers : kDgradWarps);
  static constexpr int kSummerBytes = 2 * kIn * 4;
  static constexpr int kEnd = kSumsAt + kSummers * kSummerBytes;
  static constexpr int kScratchAt =
      kGroupsAt + kGroups * kGroupBytes > kEnd ? kGroupsAt + kGroups * kGroupBytes : kEnd;
  static constexpr int kSharedBytes = kScratchAt + merge_bytes<K, kThreads>();
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(!kStaged || kConfig.ring_steps >= 3);
  static_assert(kStaged || (kIn == 16 && kSplit == 1));

  // Block barriers at the end: the groups' turns to add to dweight in shared memory.
  static constexpr int kTurns = kGroups > 1 ? kGroups : 0;

  // A multiprocessor has four parts, and warp w runs on part w % 4. Each part gets its share of
  // every role; with 2 + 2 + 4 warps dgrad and producers share two parts.
  DEVICE static Place place(int warp) {
    if constexpr (kGroups == 1 && kDgradWarps == 2 && kConfig.producers == 2) {
      if (warp < 2) return {WarpRole::kDgrad, 0, warp};
      if (warp == 4 || warp == 5) return {WarpRole::kProducer, 0, warp - 4};
      return {WarpRole::kWgrad, 0, (warp & 1) | (warp >> 1 & 2)};
    } else {
      constexpr int kInput = kDgradWarps * kGroups, kWeight = kWgradWarps * kGroups;
      if (warp < kInput) return {WarpRole::kDgrad, warp / kDgradWarps, warp % kDgradWarps};
      warp -= kInput;
      if (warp < kWeight) return {WarpRole::kWgrad, warp / kWgradWarps, warp % kWgradWarps};
      warp -= kWeight;
      return {WarpRole::kProducer, warp / kConfig.producers, warp % kConfig.producers};
    }
  }
};

// What a warp needs to know of its block. A block without a row of its own finds no image groups,
// and only helps to add up the slabs of the kernel before.
struct BackwardBlock {
  Share image_groups;
  int split;       // which part of the input channels
  int row;         // of sums and slabs
  int group;       // of the warp
  uint32_t start;  // of the group's shared memory
};

// Coefficients, and zeroed haloed rows; every warp of the block calls it once.
template <class G>
DEVICE void begin_backward(const BackwardParams& p, uint32_t group_start, int warp_of_group) {
  const uint32_t start = shared_start();
  const double count = static_cast<double>(p.batch) * G::kDySize * G::kDySize;
  // scale and shift of the input's normalisation: on their way while the sums are merged
  static_assert(2 * G::C <= G::kThreads);
  const int element = thread_index();
  const bool has_element = !G::kResidual && element < 2 * G::C;
  float value = 0;
  if (has_element) value = load_float(p.norm_before + 2 * G::C + element);
  backward_coefficients<G::K, G::kThreads>(p.bn, count, start, start + G::kScratchAt);
  if (has_element) store_shared(start + G::kScaleAt + element * 4, value);
  const int lane = thread_index() & 31;
  for (int i = (warp_of_group * 32 + lane) * 16; i < G::kStagingAt; i += G::kGroupWarps * 512) {
    store_shared(group_start + i, make_uint4(0, 0, 0, 0));
  }
  let_next_kernel_start();
  block_barrier();  // coefficients and zeros are there
}

// The same for a dgrad or wgrad warp, which also adds up its share of the slabs of the kernel
// before.
template <class G>
DEVICE void begin_gradient(const BackwardParams& p, const BackwardBlock& block,
                           int warp_of_group) {
  begin_backward<G>(p, block.start, warp_of_group);
  if (p.before.slabs != nullptr) {
    constexpr int kAdders = G::kDgradWarps + G::kWgradWarps;
    add_slabs(p.before, block.group * kAdders + warp_of_group, G::kGroups * kAdders);
  }
}

// The barrier of a step: all warps of the group meet.
template <class G>
DEVICE void step_barrier(const BackwardBlock& block) {
  group_barrier<G::kGroupWarps>(block.group + 1);
}

// The haloed rows of dy in their order, as dgrad and wgrad warps read them.
template <class G>
struct DyRing {
  const BackwardBlock& block;
  int row_of_step = 0, ring_row = 0;

  DEVICE explicit DyRing(const BackwardBlock& of_block) : block(of_block) {}
  // the place of the next row in the ring, after the barrier if it begins a step
  DEVICE uint32_t next() {
    if (row_of_step == 0) step_barrier<G>(block);  // this step's rows are there
    row_of_step = (row_of_step + 1) % G::kDyRows;
    const uint32_t row = ring_row * G::kDyRowBytes;
    ring_row = (ring_row + 1) % G::kDyRing;
    return row;
  }
};

// What is behind a warp's last step, with the same barriers in every role: `store_sums()` once the
// groups' memory is free, and `add_dweight(turn)` in the turns of the groups.
template <class G, class StoreSums, class AddDweight>
DEVICE void end_backward(StoreSums store_sums, AddDweight add_dweight) {
  block_barrier();  // every group is through: its memory is free
  store_sums();
  for (int turn = 0; turn < G::kTurns; ++turn) {
    add_dweight(turn);
    block_barrier();  // this turn is over
  }
  block_barrier();  // sums and dweight are there
}

}  // namespace cifar_resnet_fast
