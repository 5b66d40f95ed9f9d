// Producer warps of the backward kernels: rows of dy and a, and the staged epilogue. The roles and
// the barrier are described in bwd_geometry.cuh.
#pragma once

#include "bwd_geometry.cuh"

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
  const Pairs added(residual), mask(a), factor(with);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low = T::low(out.v[i]), high = T::high(out.v[i]);
    if (RESIDUAL) {
      low += T::low(added.v[i]);
      high += T::high(added.v[i]);
    }
    low = T::low(mask.v[i]) > 0 ? low : 0;
    high = T::high(mask.v[i]) > 0 ? high : 0;
    sums.first[2 * i] += low;
    sums.first[2 * i + 1] += high;
    sums.second[2 * i] = fused_multiply_add(low, T::low(factor.v[i]), sums.second[2 * i]);
    sums.second[2 * i + 1] =
        fused_multiply_add(high, T::high(factor.v[i]), sums.second[2 * i + 1]);
    out.v[i] = T::pack(low, high);
  }
  return out.chunk();
}

template <class G>
DEVICE void produce_backward(const BackwardParams& p, const BackwardBlock& block, int index) {
  using T = typename G::T;
  constexpr int kSteps = G::kConfig.ring_steps, kDyChunks = G::kDyChunks, kAChunks = G::kAChunks;
  constexpr int kInputUnit = G::kImages * Stage<G::C>::kImageBytes;  // bytes of a unit
  constexpr int kDyUnit = G::kImages * Stage<G::K>::kImageBytes;
  constexpr int kUnitSteps = G::kDySize / G::kDyRows;
  static_assert(kUnitSteps >= 3, "the staged epilogue is three steps behind");
  const int lane = thread_index() & 31, position = index * 32 + lane;
  const uint32_t raw = block.start + G::kRawAt + position * 16;
  const int first_unit = block.units.first;
  const int steps = (block.units.end - first_unit) * kUnitSteps;

  // where the lane's chunks are: in a row in global memory, in a haloed row, in a staging row
  const int dy_chunk = position % (G::K / 8), a_chunk = position % (G::kIn / 8);
  const int a_channel = block.split * G::kIn + a_chunk * 8;
  int dy_image[kDyChunks], dy_from[kDyChunks], a_image[kAChunks], a_from[kAChunks];
  int residual_from[kAChunks];
  uint32_t dy_to[kDyChunks], a_to[kAChunks];
#pragma unroll
  for (int j = 0; j < kDyChunks; ++j) {
    const int i = j * G::kProducerLanes + position;
    dy_image[j] = i / kRowChunks;
    dy_from[j] = dy_image[j] * Stage<G::K>::kImageBytes + i % kRowChunks * 16;
    dy_to[j] = block.start + G::kDyAt +
               G::DyRow::offset(dy_image[j], i % kRowChunks / (G::K / 8), dy_chunk);
  }
  bool has_residual = G::kResidual;
#pragma unroll
  for (int j = 0; j < kAChunks; ++j) {
    constexpr int kImageChunks = kRowChunks / G::kSplit;
    const int i = j * G::kProducerLanes + position, x = i % kImageChunks / (G::kIn / 8);
    a_image[j] = i / kImageChunks;
    a_from[j] = a_image[j] * Stage<G::C>::kImageBytes + (x * G::C + a_channel) * 2;
    a_to[j] = block.start + G::kAAt + G::ARow::offset(a_image[j], x, a_chunk);
    residual_from[j] = a_from[j];
    if (G::STRIDE == 2) {
      // backward of option A: even pixels of even rows get the middle channels of the smaller
      // picture
      residual_from[j] =
          a_image[j] * Stage<G::K>::kImageBytes + (x / 2 * G::K + G::C / 2 + a_channel) * 2;
      has_residual =
          x % 2 == 0;  // the same for all j: they are whole rows or an even number apart
    }
  }
  auto present = [&](int unit, int image) {
    return G::kImages == 1 || unit * G::kImages + image < p.images;
  };

  // loads of one step: the rows to produce, and the other tensors of the step that is three
  // behind; one group of copies a step
  int load_unit = first_unit, load_y = 0, side_unit = first_unit, side_y = 0;
  int load_step = 0, load_slot = 0;
  auto load = [&] {
    const uint32_t to = raw + load_slot * G::kRawStepBytes;
    if (load_unit < block.units.end) {
#pragma unroll
      for (int r = 0; r < G::kDyRows; ++r) {
        const int at = load_unit * kDyUnit + (load_y + r) * kRowBytes;
#pragma unroll
        for (int j = 0; j < kDyChunks; ++j) {
          const bool here = present(load_unit, dy_image[j]);
          const int slot = r * kDyChunks + j;
          copy_16_bytes_async(to + (G::kDzSlot + slot) * G::kSlotStride,
                              static_cast<const char*>(p.dz) + at + dy_from[j], here);
          copy_16_bytes_async(to + (G::kYSlot + slot) * G::kSlotStride,
                              static_cast<const char*>(p.y) + at + dy_from[j], here);
        }
      }
#pragma unroll
      for (int r = 0; r < G::kARows; ++r) {
        const int at = load_unit * kInputUnit + (load_y * G::STRIDE + r) * kRowBytes;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async(to + (G::kInputSlot + r * kAChunks + j) * G::kSlotStride,
                              static_cast<const char*>(p.input) + at + a_from[j],
                              present(load_unit, a_image[j]));
        }
      }
      load_y += G::kDyRows;
      if (load_y == G::kDySize) load_y = 0, ++load_unit;
    }
    if (G::kStaged && load_step >= 3 && side_unit < block.units.end) {
      const void* with = G::kResidual ? p.y_before : p.input;
#pragma unroll
      for (int r = 0; r < G::kARows; ++r) {
        const int at = side_unit * kInputUnit + (side_y * G::STRIDE + r) * kRowBytes;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async(to + (G::kSumsSlot + r * kAChunks + j) * G::kSlotStride,
                              static_cast<const char*>(with) + at + a_from[j],
                              present(side_unit, a_image[j]));
        }
      }
#pragma unroll
      for (int r = 0; r < G::kResidualRows; ++r) {
        const int at = side_unit * kDyUnit + (side_y + r) * kRowBytes;
#pragma unroll
        for (int j = 0; j < kAChunks; ++j) {
          copy_16_bytes_async(to + (G::kResidualSlot + r * kAChunks + j) * G::kSlotStride,
                              static_cast<const char*>(p.residual) + at + residual_from[j],
                              has_residual && present(side_unit, a_image[j]));
        }
      }
      side_y += G::kDyRows;
      if (side_y == G::kDySize) side_y = 0, ++side_unit;
    }
    commit_copies();
    ++load_step;
    load_slot = load_slot + 1 == kSteps ? 0 : load_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) load();

  begin_backward<G>(p, block.start, G::kInputWarps + G::kWeightWarps + index);
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
  int out_unit = first_unit, out_y = 0;
  auto finish = [&](int step, int slot) {
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const int row = (step * G::kARows + r) % (4 * G::kARows);
      const int at = out_unit * kInputUnit + (out_y * G::STRIDE + r) * kRowBytes;
      const uint32_t side = raw + slot * G::kRawStepBytes;
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        const uint4 gradient =
            load_shared_16_bytes(block.start + G::kStagingAt + row * G::kStagingRowBytes +
                                 StagingRow::offset(j * G::kProducerLanes + position));
        const uint4 a = load_shared_16_bytes(a_to[j] + row * G::kARowBytes);
        const uint4 with =
            load_shared_16_bytes(side + (G::kSumsSlot + r * kAChunks + j) * G::kSlotStride);
        const bool adds = G::kResidual && r % G::STRIDE == 0;
        const uint4 residual =
            adds ? load_shared_16_bytes(side + (G::kResidualSlot + r / G::STRIDE * kAChunks + j) *
                                                   G::kSlotStride)
                 : make_uint4(0, 0, 0, 0);
        const uint4 out = adds ? finish_chunk<T, true>(gradient, residual, a, with, sums)
                               : finish_chunk<T, false>(gradient, residual, a, with, sums);
        if (present(out_unit, a_image[j])) {
          store_16_bytes(static_cast<char*>(p.out) + at + a_from[j], out);
        }
      }
    }
    out_y += G::kDyRows;
    if (out_y == G::kDySize) out_y = 0, ++out_unit;
  };

  int slot = 0, half = 0, a_row = 0, unit = first_unit, step_of_unit = 0;
  auto next_slot = [&] { slot = slot + 1 == kSteps ? 0 : slot + 1; };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kSteps - 1>();
    if (G::kStaged && step >= 3) finish(step - 3, slot);
    const uint32_t from = raw + slot * G::kRawStepBytes;
#pragma unroll
    for (int r = 0; r < G::kDyRows; ++r) {
      uint4 dz[kDyChunks], y[kDyChunks];
#pragma unroll
      for (int j = 0; j < kDyChunks; ++j) {
        dz[j] = load_shared_16_bytes(from + (G::kDzSlot + r * kDyChunks + j) * G::kSlotStride);
        y[j] = load_shared_16_bytes(from + (G::kYSlot + r * kDyChunks + j) * G::kSlotStride);
      }
#pragma unroll
      for (int j = 0; j < kDyChunks; ++j) {
        Pairs dy(dz[j]);
        const Pairs raw_y(y[j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low =
              fused_multiply_add(a_dz[2 * i], T::low(dy.v[i]),
                                 fused_multiply_add(b_y[2 * i], T::low(raw_y.v[i]), c_1[2 * i]));
          const float high = fused_multiply_add(
              a_dz[2 * i + 1], T::high(dy.v[i]),
              fused_multiply_add(b_y[2 * i + 1], T::high(raw_y.v[i]), c_1[2 * i + 1]));
          dy.v[i] = present(unit, dy_image[j]) ? T::pack(low, high) : 0;
        }
        store_shared(dy_to[j] + (half * G::kDyRows + r) * G::kDyRowBytes, dy.chunk());
      }
    }
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      uint4 input[kAChunks];
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        input[j] =
            load_shared_16_bytes(from + (G::kInputSlot + r * kAChunks + j) * G::kSlotStride);
      }
#pragma unroll
      for (int j = 0; j < kAChunks; ++j) {
        Pairs a(input[j]);
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
    if (++step_of_unit == kUnitSteps) step_of_unit = 0, ++unit;
    load();
    next_slot();
    half ^= 1;
    group_barrier<G::kGroupWarps>(block.group + 1);  // this step's rows are there
  }

  if constexpr (G::kStaged) {
    wait_for_copies<0>();
    if (steps > 0) finish(steps - 3, slot), next_slot();
    group_barrier<G::kGroupWarps>(block.group + 1);  // the last rows are staged
    if (steps > 0) {
      finish(steps - 2, slot), next_slot();
      finish(steps - 1, slot);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float mean = load_float(p.saved_before + a_channel + i);
      sums.second[i] = fused_multiply_add(-mean, sums.first[i], sums.second[i]);
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
