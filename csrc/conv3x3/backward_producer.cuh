// Producer warps of the backward kernels: rows of dy and a, and the staged epilogue. The roles and
// the barrier are described in backward_geometry.cuh.
#pragma once

#include "conv3x3/backward_geometry.cuh"

namespace cifar_resnet_fast {

// A lane's sums of the 8 channels of its chunks: of out, and of out * (y_before - mean), which is
// accumulated as out * y_before and centred when the lane is through, before lanes are added.
struct ChunkSums {
  float first[8] = {0, 0, 0, 0, 0, 0, 0, 0}, second[8] = {0, 0, 0, 0, 0, 0, 0, 0};
};

// Finishes 8 channels of one pixel: residual, mask by a, sums; returns what is stored.
template <class T, bool RESIDUAL>
DEVICE uint4 finish_chunk(uint4 gradient, uint4 residual, uint4 a, uint4 with, ChunkSums& sums) {
  Pairs out(gradient);
  const Pairs added(residual), above_zero(a), factor(with);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = T::positive(above_zero.v[i]);
    out.v[i] &= mask;
    float low = T::low(out.v[i]), high = T::high(out.v[i]);
    if (RESIDUAL) {
      low += T::low(added.v[i] & mask);
      high += T::high(added.v[i] & mask);
      out.v[i] = T::pack(low, high);
    }
    sums.first[2 * i] += low;
    sums.first[2 * i + 1] += high;
    sums.second[2 * i] = fused_multiply_add(low, T::low(factor.v[i]), sums.second[2 * i]);
    sums.second[2 * i + 1] =
        fused_multiply_add(high, T::high(factor.v[i]), sums.second[2 * i + 1]);
  }
  return out.chunk();
}

// What a lane reads for the staged epilogue of a step.
template <class G>
struct StagedChunks {
  static constexpr int kChunks = G::kARows * G::kAChunks;
  static constexpr int kResidualChunks = G::kResidualRows > 0 ? G::kResidualRows * G::kAChunks : 1;
  uint4 gradient[kChunks], a[kChunks], with[kChunks], residual[kResidualChunks];
};

template <class G>
DEVICE void produce_backward(const BackwardParams& p, const BackwardBlock& block, int index) {
  using T = typename G::T;
  constexpr int kSteps = G::kConfig.ring_steps, kDyChunks = G::kDyChunks, kAChunks = G::kAChunks;
  constexpr int kInputGroupBytes =
      G::kImages * Stage<G::C>::kImageBytes;  // bytes of an image group
  constexpr int kDyGroupBytes = G::kImages * Stage<G::K>::kImageBytes;
  constexpr int kImageGroupSteps = G::kDySize / G::kDyRows;
  static_assert(kImageGroupSteps >= 3, "the staged epilogue is three steps behind");
  const int lane = thread_index() & 31, position = index * 32 + lane;
  const uint32_t raw = block.start + G::kRawAt + position * 16;
  const int first_group = block.image_groups.template start<G::kImageGroupStep>();
  const uint32_t steps = block.image_groups.count() * kImageGroupSteps;
  // where the rows of a step begin: of dz, y and the residual; of input, y_before and out
  auto image_group_of = [&](uint32_t step) {
    return first_group + G::kImageGroupStep * static_cast<int>(step / kImageGroupSteps);
  };
  auto dy_rows = [&](uint32_t step) {
    return image_group_of(step) * kDyGroupBytes +
           static_cast<int>(step % kImageGroupSteps) * G::kDyRows * kRowBytes;
  };
  auto a_rows = [&](uint32_t step) {
    return image_group_of(step) * kInputGroupBytes +
           static_cast<int>(step % kImageGroupSteps) * G::kARows * kRowBytes;
  };

  // where the lane's chunks are: in a row in global memory, in a haloed row, in a staging row
  const int dy_chunk = position % (G::K / 8), a_chunk = position % (G::kIn / 8);
  const int a_channel = block.split * G::kIn + a_chunk * 8;
  // Chunk j is the same distance behind the first in every lane: whole images' rows on, or parts
  // of one row.
  constexpr int kLanes = G::kProducerLanes, kAImageChunks = kRowChunks / G::kSplit;
  static_assert(kLanes % kRowChunks == 0 || kRowChunks % kLanes == 0);
  auto dy_image = [&](int j) { return position / kRowChunks + j * kLanes / kRowChunks; };
  auto a_image = [&](int j) { return position / kAImageChunks + j * kLanes / kAImageChunks; };
  auto dy_distance = [](int j) {
    return j * kLanes / kRowChunks * Stage<G::K>::kImageBytes + j * kLanes % kRowChunks * 16;
  };
  auto a_distance = [](int j) {
    return j * kLanes / kAImageChunks * Stage<G::C>::kImageBytes +
           j * kLanes % kAImageChunks * 16 * G::kSplit;
  };
  const int dy_x = position % kRowChunks / (G::K / 8);
  const int a_x = position % kAImageChunks / (G::kIn / 8);
  const int dy_from = kept(dy_image(0) * Stage<G::K>::kImageBytes + position % kRowChunks * 16);
  const int a_from = kept(a_image(0) * Stage<G::C>::kImageBytes + (a_x * G::C + a_channel) * 2);
  // Stride 2, backward of option A: even pixels of even rows get the middle channels of the
  // smaller image. Chunks of a lane are whole rows or an even number of pixels apart.
  const bool has_residual = G::kResidual && (G::STRIDE == 1 || a_x % 2 == 0);
  const int residual_from = G::STRIDE == 1 ? a_from
                                           : kept(a_image(0) * Stage<G::K>::kImageBytes +
                                                  (a_x / 2 * G::K + G::C / 2 + a_channel) * 2);
  auto residual_distance = [](int j) {  // half the pixels of twice the channels
    return j * kLanes / kAImageChunks * Stage<G::K>::kImageBytes +
           j * kLanes % kAImageChunks * 16 * G::kSplit;
  };
  uint32_t dy_to[kDyChunks], a_to[kAChunks];
#pragma unroll
  for (int j = 0; j < kDyChunks; ++j) {
    const int x = dy_x + j * kLanes % kRowChunks / (G::K / 8);
    dy_to[j] = kept(block.start + G::kDyAt + G::DyRow::offset(dy_image(j), x, dy_chunk));
  }
#pragma unroll
  for (int j = 0; j < kAChunks; ++j) {
    const int x = a_x + j * kLanes % kAImageChunks / (G::kIn / 8);
    a_to[j] = kept(block.start + G::kAAt + G::ARow::offset(a_image(j), x, a_chunk));
  }
  // images from that of the lane's first chunk on
  const int dy_images = p.batch - dy_image(0), a_images = p.batch - a_image(0);
  auto dy_present = [&](int image_group, int j) {
    return G::kImages == 1 || dy_images - image_group * G::kImages > j * kLanes / kRowChunks;
  };
  auto a_present = [&](int image_group, int j) {
    return G::kImages == 1 || a_images - image_group * G::kImages > j * kLanes / kAImageChunks;
  };

  // loads of one step: the rows to produce, and the other tensors of the step that is three
  // behind; one group of copies a step
  uint32_t load_step = 0;
  int load_slot = 0;
  auto load = [&] {
    const uint32_t to = raw + load_slot * G::kRawStepBytes;
    if (load_step < steps) {
      const int image_group = image_group_of(load_step);
#pragma unroll
      for (int r = 0; r < G::kDyRows; ++r) {
        const int at = dy_rows(load_step) + r * kRowBytes + dy_from;
#pragma unroll
        for (int j = 0; j < kDyChunks; ++j) {
          const bool here = dy_present(image_group, j);
          const int slot = r * kDyChunks + j;
          copy_16_bytes_async<G::kResidual>(to + (G::kDzSlot + slot) * G::kSlotStride,
                                            static_cast<const char*>(p.dz) + at + dy_distance(j),
                                            here);
          copy_16_bytes_async<true>(to + (G::kYSlot + slot) * G::kSlotStride,
                                    static_cast<const char*>(p.y) + at + dy_distance(j), here);
        }
      }
#pragma unroll
      for (int r = 0; r < G::kARows; ++r) {
        const int at = a_rows(load_step) + r * kRowBytes + a_from;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async<G::kResidual>(
              to + (G::kInputSlot + r * kAChunks + j) * G::kSlotStride,
              static_cast<const char*>(p.input) + at + a_distance(j), a_present(image_group, j));
        }
      }
    }
    const uint32_t side_step = load_step - 3;  // wraps: not below steps
    if (G::kStaged && side_step < steps) {
      const int image_group = image_group_of(side_step);
      const void* with = G::kResidual ? p.y_before : p.input;
#pragma unroll
      for (int r = 0; r < G::kARows; ++r) {
        const int at = a_rows(side_step) + r * kRowBytes + a_from;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async(to + (G::kSumsSlot + r * kAChunks + j) * G::kSlotStride,
                              static_cast<const char*>(with) + at + a_distance(j),
                              a_present(image_group, j));
        }
      }
#pragma unroll
      for (int r = 0; r < G::kResidualRows; ++r) {
        const int at = dy_rows(side_step) + r * kRowBytes + residual_from;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async<true>(
              to + (G::kResidualSlot + r * kAChunks + j) * G::kSlotStride,
              static_cast<const char*>(p.residual) + at + residual_distance(j),
              has_residual && a_present(image_group, j));
        }
      }
    }
    commit_copies();
    ++load_step;
    load_slot = load_slot + 1 == kSteps ? 0 : load_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) load();

  begin_backward<G>(p, block.start, G::kDgradWarps + G::kWgradWarps + index);
  float a_dz[8], b_y[8], c_1[8], scale[8], shift[8];  // dy = a_dz * dz + b_y * y + c_1
  load_8_floats(shared_start() + dy_chunk * 32, a_dz);
  load_8_floats(shared_start() + G::K * 4 + dy_chunk * 32, b_y);
  load_8_floats(shared_start() + 2 * G::K * 4 + dy_chunk * 32, c_1);
  if (!G::kResidual) {
    load_8_floats(shared_start() + G::kScaleAt + a_channel * 4, scale);
    load_8_floats(shared_start() + G::kScaleAt + (G::C + a_channel) * 4, shift);
  }

  // the staged epilogue of a step, whose other tensors are in `slot`
  ChunkSums sums;
  // every 32 chunks the staging row's keys begin again
  const uint32_t staging = kept(block.start + G::kStagingAt + StagingRow::offset(position));
  auto read_staged = [&](uint32_t step, int slot, StagedChunks<G>& chunks) {
    const uint32_t side = raw + slot * G::kRawStepBytes;
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const uint32_t row = (step * G::kARows + r) % (4 * G::kARows);
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        const int i = r * kAChunks + j;
        chunks.gradient[i] =
            load_shared_16_bytes(staging + row * G::kStagingRowBytes + j * kLanes * 16);
        chunks.a[i] = load_shared_16_bytes(a_to[j] + row * G::kARowBytes);
        chunks.with[i] = load_shared_16_bytes(side + (G::kSumsSlot + i) * G::kSlotStride);
        if (G::kResidual && r % G::STRIDE == 0) {
          const int k = r / G::STRIDE * kAChunks + j;
          chunks.residual[k] =
              load_shared_16_bytes(side + (G::kResidualSlot + k) * G::kSlotStride);
        }
      }
    }
  };
  auto finish = [&](uint32_t step, const StagedChunks<G>& chunks) {
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const int at = a_rows(step) + r * kRowBytes + a_from;
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        const int i = r * kAChunks + j;
        const bool adds = G::kResidual && r % G::STRIDE == 0;
        const uint4 out =
            adds ? finish_chunk<T, true>(chunks.gradient[i],
                                         chunks.residual[r / G::STRIDE * kAChunks + j],
                                         chunks.a[i], chunks.with[i], sums)
                 : finish_chunk<T, false>(chunks.gradient[i], make_uint4(0, 0, 0, 0), chunks.a[i],
                                          chunks.with[i], sums);
        if (a_present(image_group_of(step), j)) {
          store_16_bytes(static_cast<char*>(p.out) + at + a_distance(j), out);
        }
      }
    }
  };
  auto read_and_finish = [&](uint32_t step, int slot) {
    StagedChunks<G> chunks;
    read_staged(step, slot, chunks);
    finish(step, chunks);
  };

  int slot = 0, half = 0, a_row = 0;
  auto next_slot = [&] { slot = slot + 1 == kSteps ? 0 : slot + 1; };
#pragma unroll 1
  for (uint32_t step = 0; step < steps; ++step) {
    wait_for_copies<kSteps - 1>();
    // everything that the step reads is asked for before the first of it is used
    constexpr int kDy = G::kDyRows * kDyChunks, kA = G::kARows * kAChunks;
    const uint32_t from = raw + slot * G::kRawStepBytes;
    uint4 dz[kDy], y[kDy], input[kA];
#pragma unroll
    for (int i = 0; i < kDy; ++i) {
      dz[i] = load_shared_16_bytes(from + (G::kDzSlot + i) * G::kSlotStride);
      y[i] = load_shared_16_bytes(from + (G::kYSlot + i) * G::kSlotStride);
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      input[i] = load_shared_16_bytes(from + (G::kInputSlot + i) * G::kSlotStride);
    }
    StagedChunks<G> staged;
    const bool finishes = G::kStaged && step >= 3;
    if (finishes) read_staged(step - 3, slot, staged);
#pragma unroll
    for (int r = 0; r < G::kDyRows; ++r) {
#pragma unroll
      for (int j = 0; j < kDyChunks; ++j) {
        Pairs dy(dz[r * kDyChunks + j]);
        const Pairs raw_y(y[r * kDyChunks + j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low =
              fused_multiply_add(a_dz[2 * i], T::low(dy.v[i]),
                                 fused_multiply_add(b_y[2 * i], T::low(raw_y.v[i]), c_1[2 * i]));
          const float high = fused_multiply_add(
              a_dz[2 * i + 1], T::high(dy.v[i]),
              fused_multiply_add(b_y[2 * i + 1], T::high(raw_y.v[i]), c_1[2 * i + 1]));
          dy.v[i] = T::pack(low, high);
        }
        const uint32_t row = dy_to[j] + (half * G::kDyRows + r) * G::kDyRowBytes;
        store_shared(row, dy.chunk());
        if (!dy_present(image_group_of(step), j)) store_shared(row, make_uint4(0, 0, 0, 0));
      }
    }
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        Pairs a(input[r * kAChunks + j]);
        // of a missing image any finite a will do: its dy is zero
        if (!G::kResidual) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = fused_multiply_add(scale[2 * i], T::low(a.v[i]), shift[2 * i]);
            const float high =
                fused_multiply_add(scale[2 * i + 1], T::high(a.v[i]), shift[2 * i + 1]);
            a.v[i] = T::pack(relu(low), relu(high));
          }
        }
        store_shared(a_to[j] + a_row * G::kARowBytes, a.chunk());
      }
      a_row = a_row + 1 == G::kARing ? 0 : a_row + 1;
    }
    if (finishes) finish(step - 3, staged);
    load();
    next_slot();
    half ^= 1;
    group_barrier<G::kGroupWarps>(block.group + 1);  // this step's rows are there
  }

  if constexpr (G::kStaged) {
    float mean[8];  // of y_before, on its way while the last rows are finished
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] = load_float(p.norm_before + a_channel + i);
    wait_for_copies<0>();
    if (steps > 0) read_and_finish(steps - 3, slot), next_slot();
    group_barrier<G::kGroupWarps>(block.group + 1);  // the last rows are staged
    if (steps > 0) {
      read_and_finish(steps - 2, slot), next_slot();
      read_and_finish(steps - 1, slot);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums.second[i] = fused_multiply_add(-mean[i], sums.first[i], sums.second[i]);
#pragma unroll
      for (int mask = G::kIn / 8; mask < 32; mask <<= 1) {
        sums.first[i] += shuffle_xor(sums.first[i], mask);
        sums.second[i] += shuffle_xor(sums.second[i], mask);
      }
    }
  }
  block_barrier();  // every group is through: its memory is free
  if (G::kStaged && lane < G::kIn / 8) {
    const uint32_t to = shared_start() + G::kSumsAt +
                        (block.group * G::kConfig.producers + index) * G::kSummerBytes + lane * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_shared(to + i * 4, sums.first[i]);
      store_shared(to + (G::kIn + i) * 4, sums.second[i]);
    }
  }
  for (int i = 0; i < G::kTurns; ++i) block_barrier();
  block_barrier();  // sums and dweight are there
}

}  // namespace cifar_resnet_fast
