// Producer warps of the backward kernels: rows of dy and a, and the staged epilogue. The roles and
// the barrier are described in backward_geometry.cuh.
//
// Of a step, a lane loads its chunks of the raw rows (ProducerLoads), makes its chunks of the
// haloed rows from them (ProducedRows), and in the staged form finishes its chunks of the output
// three steps later (StagedEpilogue). It needs no other lane's chunks for any of them.
#pragma once

#include "conv3x3/backward_geometry.cuh"

namespace cifar_resnet_fast {

// A lane's chunks of a step's row of a tensor with CHANNELS channels, of which the block has one
// of SPLIT parts. Chunk j is the same distance behind the first in every lane: whole images' rows
// on, or parts of one row.
template <class G, class HALO_ROW, int CHANNELS, int SPLIT, int COUNT>
struct LaneChunks {
  static constexpr int kLanes = G::kProducerLanes, kImageChunks = kRowChunks / SPLIT;
  static constexpr int kPixelChunks = Stage<CHANNELS>::kPixelChunks / SPLIT;
  static_assert(kLanes % kRowChunks == 0 || kRowChunks % kLanes == 0);

  int position;        // of the lane in its group's producers
  int x, channel;      // the first chunk's
  int from;            // where it is in an image group's row in global memory
  int images;          // of the batch, from that of the first chunk on
  uint32_t to[COUNT];  // where the chunks are in the first haloed row

  DEVICE LaneChunks(int lane_position, int split, int batch)
      : position(lane_position),
        x(position % kImageChunks / kPixelChunks),
        channel(split * CHANNELS / SPLIT + chunk() * 8),
        from(kept(image(0) * Stage<CHANNELS>::kImageBytes + (x * CHANNELS + channel) * 2)),
        images(batch - image(0)) {}
  DEVICE void place(uint32_t haloed_rows) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const int x_j = x + j * kLanes % kImageChunks / kPixelChunks;
      to[j] = kept(haloed_rows + HALO_ROW::offset(image(j), x_j, chunk()));
    }
  }
  // within the block's part of a pixel
  DEVICE int chunk() const { return position % kPixelChunks; }
  DEVICE int image(int j) const { return position / kImageChunks + j * kLanes / kImageChunks; }
  // of chunk j from the first in global memory, if images are so many bytes apart
  DEVICE static int distance(int j, int image_bytes = Stage<CHANNELS>::kImageBytes) {
    return j * kLanes / kImageChunks * image_bytes + j * kLanes % kImageChunks * 16 * SPLIT;
  }
  DEVICE bool present(int image_group, int j) const {
    return G::kImages == 1 || images - image_group * G::kImages > j * kLanes / kImageChunks;
  }
};

// What a lane of a producer warp works on.
template <class G>
struct ProducerLane {
  static constexpr int kImageGroupSteps = G::kDySize / G::kDyRows;
  static_assert(kImageGroupSteps >= 3, "the staged epilogue is three steps behind");

  int position;
  uint32_t raw;  // the lane's first slot of the raw ring
  int first_group;
  uint32_t steps;
  LaneChunks<G, typename G::DyRow, G::K, 1, G::kDyChunks> dy;
  LaneChunks<G, typename G::ARow, G::C, G::kSplit, G::kAChunks> a;
  bool has_residual;
  int residual_from;

  DEVICE ProducerLane(const BackwardParams& p, const BackwardBlock& block, int index)
      : position(index * 32 + (thread_index() & 31)),
        raw(block.start + G::kRawAt + position * 16),
        first_group(block.image_groups.template start<G::kImageGroupStep>()),
        steps(block.image_groups.count() * kImageGroupSteps),
        dy(position, 0, p.batch),
        a(position, block.split, p.batch) {
    // Stride 2, backward of option A: even pixels of even rows get the middle channels of the
    // smaller image. Chunks of a lane are whole rows or an even number of pixels apart.
    has_residual = G::kResidual && (G::STRIDE == 1 || a.x % 2 == 0);
    residual_from = G::STRIDE == 1 ? a.from
                                   : kept(a.image(0) * Stage<G::K>::kImageBytes +
                                          (a.x / 2 * G::K + G::C / 2 + a.channel) * 2);
    dy.place(block.start + G::kDyAt);
    a.place(block.start + G::kAAt);
  }
  DEVICE int image_group(uint32_t step) const {
    return first_group + G::kImageGroupStep * static_cast<int>(step / kImageGroupSteps);
  }
  // where the rows of a step begin: of dz, y and the residual; of input, y_before and out
  DEVICE int dy_rows(uint32_t step) const {
    return image_group(step) * (G::kImages * Stage<G::K>::kImageBytes) +
           static_cast<int>(step % kImageGroupSteps) * G::kDyRows * kRowBytes;
  }
  DEVICE int a_rows(uint32_t step) const {
    return image_group(step) * (G::kImages * Stage<G::C>::kImageBytes) +
           static_cast<int>(step % kImageGroupSteps) * G::kARows * kRowBytes;
  }
};

// The slot of the raw ring behind `slot`.
template <class G>
DEVICE int next_slot(int slot) {
  return slot + 1 == G::kConfig.ring_steps ? 0 : slot + 1;
}

// Loads of one step after the other into the raw ring: the rows to produce, and the other tensors
// of the staged epilogue for the step that is three behind. One group of copies a step.
template <class G>
struct ProducerLoads {
  const BackwardParams& p;
  const ProducerLane<G>& lane;
  uint32_t step = 0;
  int slot = 0;

  DEVICE ProducerLoads(const BackwardParams& params, const ProducerLane<G>& of_lane)
      : p(params), lane(of_lane) {}
  DEVICE void load_step() {
    const uint32_t to = lane.raw + slot * G::kRawStepBytes;
    if (step < lane.steps) load_rows(to);
    // the first three steps have none: step - 3 wraps
    if (G::kStaged && step - 3 < lane.steps) load_for_epilogue(to, step - 3);
    commit_copies();
    ++step;
    slot = next_slot<G>(slot);
  }

 private:
  DEVICE void load_rows(uint32_t to) const {
    const int image_group = lane.image_group(step);
#pragma unroll
    for (int r = 0; r < G::kDyRows; ++r) {
      const int at = lane.dy_rows(step) + r * kRowBytes + lane.dy.from;
#pragma unroll
      for (int j = 0; j < G::kDyChunks; ++j) {
        const bool here = lane.dy.present(image_group, j);
        const int i = r * G::kDyChunks + j;
        copy_16_bytes_async<G::kResidual>(
            to + (G::kDzSlot + i) * G::kSlotStride,
            static_cast<const char*>(p.dz) + at + lane.dy.distance(j), here);
        copy_16_bytes_async<true>(to + (G::kYSlot + i) * G::kSlotStride,
                                  static_cast<const char*>(p.y) + at + lane.dy.distance(j), here);
      }
    }
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const int at = lane.a_rows(step) + r * kRowBytes + lane.a.from;
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        copy_16_bytes_async<G::kResidual>(
            to + (G::kInputSlot + r * G::kAChunks + j) * G::kSlotStride,
            static_cast<const char*>(p.input) + at + lane.a.distance(j),
            lane.a.present(image_group, j));
      }
    }
  }
  DEVICE void load_for_epilogue(uint32_t to, uint32_t of_step) const {
    const int image_group = lane.image_group(of_step);
    const void* with = G::kResidual ? p.y_before : p.input;
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const int at = lane.a_rows(of_step) + r * kRowBytes + lane.a.from;
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        copy_16_bytes_async(to + (G::kSumsSlot + r * G::kAChunks + j) * G::kSlotStride,
                            static_cast<const char*>(with) + at + lane.a.distance(j),
                            lane.a.present(image_group, j));
      }
    }
#pragma unroll
    for (int r = 0; r < G::kResidualRows; ++r) {
      const int at = lane.dy_rows(of_step) + r * kRowBytes + lane.residual_from;
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        // half the pixels of twice the channels at stride 2
        copy_16_bytes_async<true>(to + (G::kResidualSlot + r * G::kAChunks + j) * G::kSlotStride,
                                  static_cast<const char*>(p.residual) + at +
                                      lane.a.distance(j, Stage<G::K>::kImageBytes),
                                  lane.has_residual && lane.a.present(image_group, j));
      }
    }
  }
};

// A lane's chunks of the raw rows of a step.
template <class G>
struct RawChunks {
  static constexpr int kDy = G::kDyRows * G::kDyChunks, kA = G::kARows * G::kAChunks;
  uint4 dz[kDy], y[kDy], input[kA];

  DEVICE void read(const ProducerLane<G>& lane, int slot) {
    const uint32_t from = lane.raw + slot * G::kRawStepBytes;
#pragma unroll
    for (int i = 0; i < kDy; ++i) {
      dz[i] = load_shared_16_bytes(from + (G::kDzSlot + i) * G::kSlotStride);
      y[i] = load_shared_16_bytes(from + (G::kYSlot + i) * G::kSlotStride);
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      input[i] = load_shared_16_bytes(from + (G::kInputSlot + i) * G::kSlotStride);
    }
  }
};

// Makes the haloed rows of dy and a, one step after the other.
template <class G>
struct ProducedRows {
  using T = typename G::T;
  const ProducerLane<G>& lane;
  float a_dz[8], b_y[8], c_1[8];  // dy = a_dz * dz + b_y * y + c_1
  float scale[8], shift[8];       // backward_second: a = relu(scale * input + shift)
  int half = 0, a_row = 0;        // the step's place in the rings of dy and of a

  // once the coefficients are there
  DEVICE explicit ProducedRows(const ProducerLane<G>& of_lane) : lane(of_lane) {
    load_8_floats(shared_start() + lane.dy.channel * 4, a_dz);
    load_8_floats(shared_start() + (G::K + lane.dy.channel) * 4, b_y);
    load_8_floats(shared_start() + (2 * G::K + lane.dy.channel) * 4, c_1);
    if (!G::kResidual) {
      load_8_floats(shared_start() + G::kScaleAt + lane.a.channel * 4, scale);
      load_8_floats(shared_start() + G::kScaleAt + (G::C + lane.a.channel) * 4, shift);
    }
  }
  DEVICE void produce_step(uint32_t step, const RawChunks<G>& raw) {
#pragma unroll
    for (int r = 0; r < G::kDyRows; ++r) {
#pragma unroll
      for (int j = 0; j < G::kDyChunks; ++j) {
        const int i = r * G::kDyChunks + j;
        const uint32_t row = lane.dy.to[j] + (half * G::kDyRows + r) * G::kDyRowBytes;
        store_shared(row, dy_of(raw.dz[i], raw.y[i]));
        if (!lane.dy.present(lane.image_group(step), j)) {
          store_shared(row, make_uint4(0, 0, 0, 0));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        // of a missing image any finite a will do: its dy is zero
        store_shared(lane.a.to[j] + a_row * G::kARowBytes, a_of(raw.input[r * G::kAChunks + j]));
      }
      a_row = a_row + 1 == G::kARing ? 0 : a_row + 1;
    }
    half ^= 1;
  }

 private:
  DEVICE uint4 dy_of(uint4 dz, uint4 y) const {
    Pairs dy(dz);
    const Pairs raw_y(y);
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
    return dy.chunk();
  }
  DEVICE uint4 a_of(uint4 input) const {
    if (G::kResidual) return input;
    Pairs a(input);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = fused_multiply_add(scale[2 * i], T::low(a.v[i]), shift[2 * i]);
      const float high = fused_multiply_add(scale[2 * i + 1], T::high(a.v[i]), shift[2 * i + 1]);
      a.v[i] = T::pack(relu(low), relu(high));
    }
    return a.chunk();
  }
};

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

// The staged epilogue: finishes the rows that the dgrad warps have put into the staging ring.
template <class G>
struct StagedEpilogue {
  using T = typename G::T;
  const BackwardParams& p;
  const ProducerLane<G>& lane;
  uint32_t staging;  // the lane's first chunk; every 32 chunks the staging row's keys begin again
  ChunkSums sums;

  DEVICE StagedEpilogue(const BackwardParams& params, const BackwardBlock& block,
                        const ProducerLane<G>& of_lane)
      : p(params),
        lane(of_lane),
        staging(kept(block.start + G::kStagingAt + StagingRow::offset(lane.position))) {}
  // `slot` of the raw ring has the step's other tensors
  DEVICE void read(uint32_t step, int slot, StagedChunks<G>& chunks) const {
    const uint32_t side = lane.raw + slot * G::kRawStepBytes;
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const uint32_t row = (step * G::kARows + r) % (4 * G::kARows);
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        const int i = r * G::kAChunks + j;
        chunks.gradient[i] =
            load_shared_16_bytes(staging + row * G::kStagingRowBytes + j * G::kProducerLanes * 16);
        chunks.a[i] = load_shared_16_bytes(lane.a.to[j] + row * G::kARowBytes);
        chunks.with[i] = load_shared_16_bytes(side + (G::kSumsSlot + i) * G::kSlotStride);
        if (adds_residual(r)) {
          const int k = r / G::STRIDE * G::kAChunks + j;
          chunks.residual[k] =
              load_shared_16_bytes(side + (G::kResidualSlot + k) * G::kSlotStride);
        }
      }
    }
  }
  DEVICE void finish(uint32_t step, const StagedChunks<G>& chunks) {
#pragma unroll
    for (int r = 0; r < G::kARows; ++r) {
      const int at = lane.a_rows(step) + r * kRowBytes + lane.a.from;
#pragma unroll
      for (int j = 0; j < G::kAChunks; ++j) {
        const int i = r * G::kAChunks + j;
        const uint4 out =
            adds_residual(r)
                ? finish_chunk<T, true>(chunks.gradient[i],
                                        chunks.residual[r / G::STRIDE * G::kAChunks + j],
                                        chunks.a[i], chunks.with[i], sums)
                : finish_chunk<T, false>(chunks.gradient[i], make_uint4(0, 0, 0, 0), chunks.a[i],
                                         chunks.with[i], sums);
        if (lane.a.present(lane.image_group(step), j)) {
          store_16_bytes(static_cast<char*>(p.out) + at + lane.a.distance(j), out);
        }
      }
    }
  }
  DEVICE void read_and_finish(uint32_t step, int slot) {
    StagedChunks<G> chunks;
    read(step, slot, chunks);
    finish(step, chunks);
  }
  // centres the sums, and adds those of the lanes with the same channels, in a fixed order
  DEVICE void add_lanes(const float (&mean)[8]) {
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
  // the first lanes put the warp's sums at `address`
  DEVICE void store_sums(uint32_t address) const {
    const int warp_lane = thread_index() & 31;
    if (warp_lane >= G::kIn / 8) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_shared(address + warp_lane * 32 + i * 4, sums.first[i]);
      store_shared(address + warp_lane * 32 + (G::kIn + i) * 4, sums.second[i]);
    }
  }

 private:
  DEVICE static constexpr bool adds_residual(int r) { return G::kResidual && r % G::STRIDE == 0; }
};

template <class G>
DEVICE void produce_backward(const BackwardParams& p, const BackwardBlock& block, int index) {
  constexpr int kRingSteps = G::kConfig.ring_steps;
  const ProducerLane<G> lane(p, block, index);
  wait_for_kernel_before();
  ProducerLoads<G> loads(p, lane);
#pragma unroll
  for (int i = 0; i < kRingSteps; ++i) loads.load_step();

  begin_backward<G>(p, block.start, G::kDgradWarps + G::kWgradWarps + index);
  ProducedRows<G> rows(lane);
  StagedEpilogue<G> epilogue(p, block, lane);
#pragma unroll 1
  for (uint32_t step = 0; step < lane.steps; ++step) {
    wait_for_copies<kRingSteps - 1>();
    const int slot = loads.slot;  // has what was loaded for this step, and is loaded next
    // everything that the step reads is asked for before the first of it is used
    RawChunks<G> raw;
    raw.read(lane, slot);
    StagedChunks<G> staged;
    const bool finishes = G::kStaged && step >= 3;
    if (finishes) epilogue.read(step - 3, slot, staged);
    rows.produce_step(step, raw);
    if (finishes) epilogue.finish(step - 3, staged);
    loads.load_step();
    step_barrier<G>(block);  // this step's rows are there
  }

  if constexpr (G::kStaged) {
    float mean[8];  // of y_before, on its way while the last rows are finished
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] = load_float(p.norm_before + lane.a.channel + i);
    wait_for_copies<0>();
    const int slot = loads.slot;
    if (lane.steps > 0) epilogue.read_and_finish(lane.steps - 3, slot);
    step_barrier<G>(block);  // the last rows are staged
    if (lane.steps > 0) {
      epilogue.read_and_finish(lane.steps - 2, next_slot<G>(slot));
      epilogue.read_and_finish(lane.steps - 1, next_slot<G>(next_slot<G>(slot)));
    }
    epilogue.add_lanes(mean);
  }
  end_backward<G>(
      [&] {
        if (G::kStaged) {
          epilogue.store_sums(shared_start() + G::kSumsAt +
                              (block.group * G::kConfig.producers + index) * G::kSummerBytes);
        }
      },
      [](int) {});
}

}  // namespace cifar_resnet_fast
