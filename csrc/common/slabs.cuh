// Adding up the weight-gradient slabs that a backward kernel left, one a block.
#pragma once

#include "common/params.h"
#include "common/warp.cuh"

namespace cifar_resnet_fast {

// Four neighbouring elements of the slabs `first`, `first` + STEP, ..., added up by eight lanes
// that share them, i / 4 of lane i apart. IN_FLIGHT loads are on their way at a time. All lanes
// get the sum.
template <int STEP, int IN_FLIGHT>
DEVICE void add_four(const SlabSum& s, int element, int first, float (&sum)[4]) {
  const int elements = 9 * s.C * s.K;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = 0;
  for (int slab = first; slab < s.count; slab += STEP * IN_FLIGHT) {
    uint4 v[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      v[i] = make_uint4(0, 0, 0, 0);
      if (slab + STEP * i < s.count) {
        v[i] =
            load_16_bytes(s.slabs + static_cast<long long>(slab + STEP * i) * elements + element);
      }
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      sum[0] += as_float(v[i].x), sum[1] += as_float(v[i].y);
      sum[2] += as_float(v[i].z), sum[3] += as_float(v[i].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int mask = 4; mask < 32; mask <<= 1) sum[i] += shuffle_xor(sum[i], mask);
  }
}

// Writes the gradient of the four elements of a slab from `element` on.
DEVICE void store_four(const SlabSum& s, int element, const float (&sum)[4]) {
  const int tap = element / (s.C * s.K), c = element / s.K % s.C, k = element % s.K;
  if (c >= s.C_kept) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int place = s.layout == WeightLayout::kContiguous ? c * 9 + tap : tap * s.C_kept + c;
    store_float(s.dweight + (k + i) * 9 * s.C_kept + place, sum[i]);
  }
}

// This block's share of s.dweight, by `warps` of its warps; no barriers. A warp makes 16
// neighbouring elements of a slab at a time: eight lanes share the slabs of four of them, lane i /
// 4 the slabs i / 4, i / 4 + 8, ..., and are added up in a fixed order.
DEVICE void add_slabs(const SlabSum& s, int warp, int warps) {
  const int lane = thread_index() & 31, pieces = 9 * s.C * s.K / 16;
  const int first =
      static_cast<int>(static_cast<long long>(pieces) * block_index() / block_count());
  const int end =
      static_cast<int>(static_cast<long long>(pieces) * (block_index() + 1) / block_count());
  for (int piece = first + warp; piece < end; piece += warps) {
    const int element = piece * 16 + (lane & 3) * 4;
    float sum[4];
    add_four<8, 9>(s, element, lane >> 2, sum);
    if (lane < 4) store_four(s, element, sum);
  }
}

// The same by all WARPS of a kernel that has nothing else to do: they share the slabs of each
// piece, so that one round of loads takes hundreds. Needs 64 bytes of shared memory a warp.
template <int WARPS>
DEVICE void add_slabs_together(const SlabSum& s) {
  const int lane = thread_index() & 31, warp = thread_index() >> 5, pieces = 9 * s.C * s.K / 16;
  for (int piece = block_index(); piece < pieces; piece += block_count()) {
    const int element = piece * 16 + (lane & 3) * 4;
    float sum[4];
    add_four<8 * WARPS, 4>(s, element, thread_index() >> 2, sum);
    if (lane < 4) {
      store_shared(shared_start() + warp * 64 + lane * 16,
                   make_uint4(as_bits(sum[0]), as_bits(sum[1]), as_bits(sum[2]), as_bits(sum[3])));
    }
    block_barrier();  // the warps' sums are there
    if (thread_index() < 4) {
#pragma unroll
      for (int w = 1; w < WARPS; ++w) {
        const uint4 v = load_shared_16_bytes(shared_start() + w * 64 + lane * 16);
        sum[0] += as_float(v.x), sum[1] += as_float(v.y);
        sum[2] += as_float(v.z), sum[3] += as_float(v.w);
      }
      store_four(s, element, sum);
    }
    block_barrier();  // and have been read
  }
}

}  // namespace cifar_resnet_fast
