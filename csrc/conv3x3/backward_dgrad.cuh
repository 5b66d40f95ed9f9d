// Dgrad warps of the backward kernels. The roles and the barrier are described in
// backward_geometry.cuh; at stride 1 the rows rotate as in conv_rows.cuh, with mirrored taps.
#pragma once

#include "conv3x3/backward_geometry.cuh"

namespace cifar_resnet_fast {

// A lane's four channels of one pixel of a finished row: to a row of the staging ring, or done
// here. `index` says which 16 of the block's input channels.
template <class G>
struct StagedRows {
  using T = typename G::T;
  int row = 0;

  // where the lane puts a pixel of the first row
  DEVICE static uint32_t place(const BackwardBlock& block, int image, int x, int index) {
    const int t = thread_index() & 3;
    const int chunk = (image * G::kSize + x) * (G::kIn / 8) + 2 * index + (t >> 1);
    return kept(block.start + G::kStagingAt + StagingRow::offset(chunk) + (t & 1) * 8);
  }
  // a pixel so many on from one at a place: a multiple of 32 chunks, where the keys begin again
  DEVICE void put(uint32_t place, int pixels, const float (&v)[4]) const {
    store_shared(place + row * G::kStagingRowBytes + pixels * G::kIn * 2, pack_4<T>(v));
  }
  DEVICE void next_row() { row = row + 1 == 4 * G::kARows ? 0 : row + 1; }
};

// The direct form: 16 channels, one image an image group, one warp a group. The other tensors of
// the lane's four half tiles come row by row through its own part of the side ring.
template <class G>
struct DirectRows {
  using T = typename G::T;
  static constexpr int kHalves = 4;
  static constexpr int kRing = G::kConfig.side_rows;
  // from behind an image to the next one
  static constexpr int kToNextImage = (G::kImageGroupStep - 1) * Stage<G::C>::kImageBytes;

  const BackwardParams& p;
  const BackwardBlock& block;
  uint32_t a[kHalves];  // in a haloed row
  uint32_t side;        // the lane's part of the ring
  ChannelSums sums;
  float mean[4];              // of y_before
  int load_at, out_at;        // the lane's first pixel of a row, in bytes from the tensors' start
  int loads_left, out_y = 0;  // rows to load; the row of the image that is finished next
  int slot = 0, a_row = 0;

  DEVICE DirectRows(const BackwardParams& params, const BackwardBlock& where, int index)
      : p(params),
        block(where),
        side(where.start + G::kSideAt + index * G::kSideBytes + (thread_index() & 31) * 8),
        load_at(kept(where.image_groups.template start<G::kImageGroupStep>() *
                         Stage<G::C>::kImageBytes +
                     tile_pixel<16>(0, 0, thread_index() & 31) * 32 + (thread_index() & 3) * 8)),
        out_at(load_at),
        loads_left(where.image_groups.count() * G::kSize) {
    const int lane = thread_index() & 31, t = lane & 3;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int x = tile_pixel<16>(i / 2, i % 2, lane);
      a[i] = kept(where.start + G::kAAt + G::ARow::offset(0, x, t >> 1) + (t & 1) * 8);
    }
    for (int i = 0; i < kRing; ++i) load_row(i);
#pragma unroll
    for (int k = 0; k < 4; ++k) mean[k] = load_float(p.norm_before + t * 4 + k);
  }
  // of half tile i from the first, in bytes
  DEVICE static int distance(int i) { return tile_pixel<16>(i / 2, i % 2, 0) * 32; }
  // from sums of out * y_before to sums of out * (y_before - mean), before lanes are added
  DEVICE void centre() {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums.second[k] = fused_multiply_add(-mean[k], sums.first[k], sums.second[k]);
    }
  }
  DEVICE void load_row(int to_slot) {
    const uint32_t to = side + to_slot * G::kSideRowBytes;
    const void* with = G::kResidual ? p.y_before : p.input;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      copy_8_bytes_async(to + i * 256, static_cast<const char*>(with) + load_at + distance(i),
                         loads_left > 0);
      if (G::kResidual) {
        copy_8_bytes_async<true>(to + (kHalves + i) * 256,
                                 static_cast<const char*>(p.residual) + load_at + distance(i),
                                 loads_left > 0);
      }
    }
    commit_copies();
    load_at += kRowBytes;
    --loads_left;
    if (loads_left % G::kSize == 0) load_at += kToNextImage;
  }
  DEVICE void finish(const Tile (&row)[2]) {
    wait_for_copies<kRing - 1>();
    const uint32_t from = side + slot * G::kSideRowBytes;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const uint2 mask = load_shared_8_bytes(a[i] + a_row * G::kARowBytes);
      const uint2 with = load_shared_8_bytes(from + i * 256);
      float v[4];
      row[i / 2].channels(i % 2, v);
      if (G::kResidual) {
        const uint2 residual = load_shared_8_bytes(from + (kHalves + i) * 256);
        v[0] += T::low(residual.x), v[1] += T::high(residual.x);
        v[2] += T::low(residual.y), v[3] += T::high(residual.y);
      }
      v[0] = T::low(mask.x) > 0 ? v[0] : 0, v[1] = T::high(mask.x) > 0 ? v[1] : 0;
      v[2] = T::low(mask.y) > 0 ? v[2] : 0, v[3] = T::high(mask.y) > 0 ? v[3] : 0;
      const float factor[4] = {T::low(with.x), T::high(with.x), T::low(with.y), T::high(with.y)};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums.first[k] += v[k];
        sums.second[k] = fused_multiply_add(v[k], factor[k], sums.second[k]);
      }
      store_8_bytes(static_cast<char*>(p.out) + out_at + distance(i), pack_4<T>(v));
    }
    load_row(slot);
    slot = slot + 1 == kRing ? 0 : slot + 1;
    a_row = a_row + 1 == G::kARing ? 0 : a_row + 1;
    out_at += kRowBytes;
    if (++out_y == G::kSize) out_y = 0, out_at += kToNextImage;
  }
};

// Behind the last row: the block's barriers, and the direct form's sums.
template <class G>
DEVICE void end_dgrad(ChannelSums* sums, const BackwardBlock& block, int index) {
  if (G::kStaged) {
    step_barrier<G>(block);  // the last rows are staged
  } else {
    sums->add_lanes();
  }
  end_backward<G>(
      [&] {
        if (!G::kStaged) {
          sums->store(shared_start() + G::kSumsAt +
                      (block.group * G::kDgradWarps + index) * G::kSummerBytes);
        }
      },
      [](int) {});
}

template <class G>
DEVICE void dgrad(const BackwardParams& p, const BackwardBlock& block, int index) {
  constexpr int kInSixteens = G::kIn / 16, kTiles = G::kConfig.tiles_per_warp;
  const int sixteen = index % kInSixteens, first_tile = index / kInSixteens;
  const int lane = thread_index() & 31;
  WeightFragments<G::K / 16> weights;
  weights.load(p.fragments, block.split * kInSixteens + sixteen);
  wait_for_kernel_before();

  DyRing<G> dy(block);
  auto fetch = [&] { return dy.next(); };
  const FragmentAddresses<G::K> fragments(block.start + G::kDyAt, first_tile);
  const int image_groups = block.image_groups.count();
  RowConvolution<typename G::T, G::K, kTiles> convolution;
  if constexpr (G::kStaged) {
    begin_gradient<G>(p, block, index);
    StagedRows<G> staged;
    const uint32_t place = staged.place(block, first_tile * Stage<G::K>::kImagesPerTile,
                                        tile_pixel<G::K>(0, 0, lane), sixteen);
    auto finish = [&](const Tile(&row)[kTiles], bool done) {
      if (!done) return;
#pragma unroll
      for (int i = 0; i < kTiles * 2; ++i) {
        float v[4];
        row[i / 2].channels(i % 2, v);
        const int image = G::K == 64 ? i : i / 2;
        staged.put(place, image * G::kSize + tile_pixel<G::K>(i / 2, i % 2, 0), v);
      }
      staged.next_row();
    };
    convolution.template stream<G::kSize>(image_groups, fragments, weights, fetch, finish);
    end_dgrad<G>(nullptr, block, index);
  } else {
    DirectRows<G> direct(p, block, index);
    begin_gradient<G>(p, block, index);
    auto finish = [&](const Tile(&row)[kTiles], bool done) {
      if (done) direct.finish(row);
    };
    convolution.template stream<G::kSize>(image_groups, fragments, weights, fetch, finish);
    wait_for_copies<0>();
    direct.centre();
    end_dgrad<G>(&direct.sums, block, index);
  }
}

// Stride 2: an input pixel gets the taps that lead from it to an output pixel. With (i, j) a pixel
// of dy, row 2i takes ky = 1 from row i; row 2i + 1 takes ky = 2 from row i and ky = 0 from row i
// + 1; columns likewise. So a row i of dy, read at shifts 0 and + 1, finishes row 2i - 1, makes
// row 2i and begins row 2i + 1: 9 products of tiles, the same number as at stride 1.
template <class G>
DEVICE void dgrad_stride_2(const BackwardParams& p, const BackwardBlock& block, int index) {
  using T = typename G::T;
  constexpr int kSteps = G::K / 16;
  static_assert(G::kTiles == 1 && G::kDgradWarps == G::kIn / 16 && G::kDyRows == 1);
  const int lane = thread_index() & 31;
  WeightFragments<kSteps> weights;
  weights.load(p.fragments, index);
  wait_for_kernel_before();
  begin_gradient<G>(p, block, index);

  // of the fragments of kx = 1 and 2 in conv_rows.cuh: shifts 0 and + 1
  uint32_t fragment[2];
  const int second = lane >> 3 & 1;
#pragma unroll
  for (int shift = 0; shift < 2; ++shift) {
    const int image = G::K == 64 ? second : 0, j = (lane & 7) + (G::K == 64 ? 0 : 8 * second);
    fragment[shift] = block.start + G::kDyAt + G::DyRow::offset(image, j + shift, lane >> 4);
  }
  StagedRows<G> staged;
  const int first_x = 2 * tile_pixel<G::K>(0, 0, lane);
  const uint32_t place[2] = {staged.place(block, 0, first_x, index),
                             staged.place(block, 0, first_x + 1, index)};
  auto put = [&](const Tile(&columns)[2]) {  // even and odd columns
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[4];
      columns[i / 2].channels(i % 2, v);
      const int image = G::K == 64 ? i % 2 : 0;
      staged.put(place[i / 2], image * G::kSize + 2 * tile_pixel<G::K>(0, i % 2, 0), v);
    }
    staged.next_row();
  };
  Tile before[2], even[2], odd[2];  // rows 2i - 1, 2i, 2i + 1; of each even and odd columns
  uint32_t row = 0;
  for (int left = block.image_groups.count(); left > 0; --left) {
    before[0].clear(), before[1].clear();
#pragma unroll 1
    for (int i = 0; i < G::kDySize; ++i) {
      even[0].clear(), even[1].clear(), odd[0].clear(), odd[1].clear();
      step_barrier<G>(block);  // this step's rows are there
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t here[4], right[4];
        load_matrices(here, G::DyRow::channels_on(fragment[0] + row, s));
        load_matrices(right, G::DyRow::channels_on(fragment[1] + row, s));
        auto add = [&](Tile(&to)[2], int ky) {  // the fragments' taps are mirrored
          to[0].template add_product<T>(here, weights.tap[2 - ky][1][s]);
          to[1].template add_product<T>(here, weights.tap[2 - ky][0][s]);
          to[1].template add_product<T>(right, weights.tap[2 - ky][2][s]);
        };
        add(before, 0);
        add(even, 1);
        add(odd, 2);
      }
      if (i > 0) put(before);
      put(even);
      before[0] = odd[0], before[1] = odd[1];
      row ^= G::kDyRowBytes;
    }
    put(before);
  }
  end_dgrad<G>(nullptr, block, index);
}

}  // namespace cifar_resnet_fast
