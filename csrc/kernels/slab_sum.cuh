// Adding up the weight-gradient slabs that a backward kernel left, one a block.
#pragma once

#include "conv3x3.h"
#include "warp.cuh"

namespace cifar_resnet_fast {

// This block's share of s.dweight, by `warps` of its warps; no barriers. A warp makes 16
// neighbouring elements of a slab at a time: eight lanes share the slabs of four of them, lane i /
// 4 the slabs i / 4, i / 4 + 8, ..., and are added up in a fixed order.
DEVICE void add_slabs(const SlabSum& s, int warp, int warps) {
  constexpr int kInFlight = 9;
  const int lane = thread_index() & 31, elements = 9 * s.C * s.K, pieces = elements / 16;
  const int first =
      static_cast<int>(static_cast<long long>(pieces) * block_index() / block_count());
  const int end =
      static_cast<int>(static_cast<long long>(pieces) * (block_index() + 1) / block_count());
  for (int piece = first + warp; piece < end; piece += warps) {
    const int element = piece * 16 + (lane & 3) * 4;
    float sum[4] = {0, 0, 0, 0};
    for (int slab = lane >> 2; slab < s.count; slab += 8 * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (slab + 8 * i < s.count) {
          v[i] =
              load_16_bytes(s.slabs + static_cast<long long>(slab + 8 * i) * elements + element);
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        sum[0] += as_float(v[i].x), sum[1] += as_float(v[i].y);
        sum[2] += as_float(v[i].z), sum[3] += as_float(v[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask <<= 1) sum[i] += shuffle_xor(sum[i], mask);
    }
    const int tap = element / (s.C * s.K), c = element / s.K % s.C, k = element % s.K;
    if (lane < 4 && c < s.C_kept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = s.layout == WeightLayout::kContiguous ? c * 9 + tap : tap * s.C_kept + c;
        store_float(s.dweight + (k + i) * 9 * s.C_kept + place, sum[i]);
      }
    }
  }
}

}  // namespace cifar_resnet_fast
