// The stem's forward convolution and weight gradient.
//
// A pixel of a image has 4 channels, 8 bytes, so that the 3 pixels under a row of taps, and a
// fourth that is taken for zero, make the 16 "input channels" 4 kx + c of one mma step: the 3x3
// convolution becomes three products, one for each ky. A warp works alone, on strips of 8 rows of
// a image.
#include "common/conv_rows.cuh"
#include "common/launch.cuh"
#include "common/norm.cuh"
#include "common/shapes.cuh"
#include "common/slabs.cuh"
#include "stem/stem.h"

namespace cifar_resnet_fast {
namespace {

constexpr int kSize = 32, kInputRowBytes = kSize * 8, kInputBytes = kSize * kInputRowBytes;
constexpr int kStripRows = 8, kStrips = kSize / kStripRows;  // of a image
constexpr int kWarps = 8, kThreads = kWarps * 32;

// ---- forward ----

// The pixels of one input row as two tiles of 16 outputs see them, straight from global memory: of
// output pixel x, lane (g, t) has the channels 2t, 2t + 1 and 2t + 8, 2t + 9 of those 16.
struct InputRow {
  uint32_t pixels[2][4];

  DEVICE void load(const char* row, bool inside) {
    const int lane = thread_index() & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i & 1, kx = (t >> 1) + (i & 2), tile = i >> 2;
      const int x = 16 * tile + g + 8 * half + kx - 1;
      const bool there = inside && kx < 3 && x >= 0 && x < kSize;
      const uint32_t known = t & 1 ? 0x0000ffffu : 0xffffffffu;  // not the fourth channel
      pixels[tile][i & 3] = there ? load_4_bytes(row + x * 8 + (t & 1) * 4) & known : 0;
    }
  }
};

template <class T, bool EVALUATES>
__global__ void __launch_bounds__(kThreads, 2) stem_forward_kernel(StemForwardParams p) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31, g = lane >> 2, t = lane & 3;
  uint4 weights[3];
#pragma unroll
  for (int ky = 0; ky < 3; ++ky) {
    weights[ky] = load_16_bytes_constant(static_cast<const uint4*>(p.fragments) + ky * 32 + lane);
  }
  let_next_kernel_start();
  wait_for_kernel_before();

  const Share strips(p.batch * kStrips, block_index() * kWarps + warp, block_count() * kWarps);
  ChannelSums sums;
  float bias[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (EVALUATES) bias[i] = load_float(p.bias + t * 4 + i);
  }
  for (int strip = strips.first; strip < strips.end; ++strip) {
    const int first_y = strip % kStrips * kStripRows;
    const char* image = static_cast<const char*>(p.images) + strip / kStrips * kInputBytes;
    char* out = static_cast<char*>(p.y) + strip / kStrips * Stage<16>::kImageBytes;
    auto load = [&](InputRow& row, int y) {
      row.load(image + y * kInputRowBytes, y >= 0 && y < kSize && y <= first_y + kStripRows);
    };
    // input row y adds to the output rows above, here and below, as in conv_rows.cuh
    Tile rows[3][2];
#pragma unroll
    for (int i = 0; i < 6; ++i) rows[i / 2][i % 2].clear();
    InputRow input, next;
    load(input, first_y - 1);
    for (int first = 0; first < kStripRows + 2; first += 3) {
#pragma unroll
      for (int turn = 0; turn < 3; ++turn) {
        const int y = first_y - 1 + first + turn;
        load(next, y + 1);
        Tile(&here)[2] = rows[turn], (&below)[2] = rows[(turn + 1) % 3];
        Tile(&above)[2] = rows[(turn + 2) % 3];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          below[tile].clear();
          above[tile].template add_product<T>(input.pixels[tile], weights[2]);
          here[tile].template add_product<T>(input.pixels[tile], weights[1]);
          below[tile].template add_product<T>(input.pixels[tile], weights[0]);
        }
        if (y > first_y && y <= first_y + kStripRows) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int x = 16 * (i / 2) + g + 8 * (i % 2);
            char* at = out + (y - 1) * kRowBytes + x * 32 + t * 8;
            if (EVALUATES) {
              write_half_tile<T>(above[i / 2], i % 2, at, true, bias, make_uint2(0, 0));
            } else {
              write_half_tile<T>(above[i / 2], i % 2, at, true, sums);
            }
          }
        }
        input = next;
      }
    }
  }
  if (EVALUATES) return;
  sums.add_lanes();
  sums.store(shared_start() + warp * kWarpSumBytes);
  block_barrier();  // the warps' sums are there
  for (int i = thread_index(); i < 32; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += load_shared_float(shared_start() + w * kWarpSumBytes + i * 4);
    }
    store_float(p.y_sums + block_index() * 32 + i, sum);
  }
}

// ---- backward ----

// Shared memory of a warp: a ring of raw rows, lane-private; a row of dy; a row of a, each of
// whose pixels has the 16 channels that the forward product sees.
using WorkRow = HaloRow<16, kSize>;
constexpr int kRing = 4;
constexpr int kRawBytes = 2 * kRowBytes + kInputRowBytes;  // dz, y, image
constexpr int kDyAt = kRing * kRawBytes, kAAt = kDyAt + WorkRow::kImageBytes;
constexpr int kWarpBytes = kAAt + WorkRow::kImageBytes;
constexpr int kWarpsAt = 256;  // behind the coefficients A, B, C
constexpr int kSlabElements = 9 * 4 * 16;
constexpr int kScratchAt = kWarpsAt + kWarps * kWarpBytes;
constexpr int kBackwardBytes = kScratchAt + merge_bytes<16, kThreads>();
static_assert(kBackwardBytes <= kMaxSharedBytes);
// A strip's dy rows meet the rows of a from one above to one below it; row q of a meets the dy of
// rows q + 1, q and q - 1 once q + 1 is there, so a strip takes so many steps.
constexpr int kSteps = kStripRows + 3;

// 16 pixels by 16 channels of two halves of a row, as mma takes them
struct RowFragments {
  uint32_t v[2][4];
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i / 4][i % 4] = 0;
  }
  DEVICE void load(uint32_t address) {
    load_matrices_transposed(v[0], address);
    load_matrices_transposed(v[1], WorkRow::lines_on<4>(address));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) stem_backward_kernel(StemBackwardParams p) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31;
  const uint32_t mine = shared_start() + kWarpsAt + warp * kWarpBytes;
  let_next_kernel_start();
  wait_for_kernel_before();

  // a lane has chunks `lane` and `lane + 32` of a row of dz and y, and pixel `lane` of the image
  const Share strips(p.batch * kStrips, block_index() * kWarps + warp, block_count() * kWarps);
  int load_strip = strips.first, load_step = 0, load_slot = 0;
  auto load = [&] {
    if (load_strip < strips.end) {
      const uint32_t to = mine + load_slot * kRawBytes;
      const int y = load_strip % kStrips * kStripRows - 1 + load_step;
      const bool has_dy = load_step > 0 && load_step <= kStripRows;
      const bool has_a = load_step <= kStripRows + 1 && y >= 0 && y < kSize;
      const long long image = load_strip / kStrips;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const long long from =
            image * Stage<16>::kImageBytes + y * kRowBytes + (j * 32 + lane) * 16;
        copy_16_bytes_async(to + (j * 32 + lane) * 16, static_cast<const char*>(p.dz) + from,
                            has_dy);
        copy_16_bytes_async(to + kRowBytes + (j * 32 + lane) * 16,
                            static_cast<const char*>(p.y) + from, has_dy);
      }
      copy_8_bytes_async(
          to + 2 * kRowBytes + lane * 8,
          static_cast<const char*>(p.images) + image * kInputBytes + y * kInputRowBytes + lane * 8,
          has_a);
      if (++load_step == kSteps) load_step = 0, ++load_strip;
    }
    commit_copies();
    load_slot = (load_slot + 1) % kRing;
  };
#pragma unroll
  for (int i = 0; i < kRing; ++i) load();

  const uint32_t start = shared_start();
  backward_coefficients<16, kThreads>(p.bn, static_cast<double>(p.batch) * kSize * kSize, start,
                                      start + kScratchAt);
  // the pixels that no image has, and the fourth under each row of taps, stay zero
  for (int i = lane * 16; i < WorkRow::kImageBytes; i += 512) {
    store_shared(mine + kAAt + i, make_uint4(0, 0, 0, 0));
  }
  block_barrier();  // coefficients are there
  if (p.before.slabs != nullptr) add_slabs(p.before, warp, kWarps);
  float a_dz[8], b_y[8], c_1[8];
  load_8_floats(start + (lane & 1) * 32, a_dz);
  load_8_floats(start + 64 + (lane & 1) * 32, b_y);
  load_8_floats(start + 128 + (lane & 1) * 32, c_1);

  // the lane's addresses: where it puts its chunks and its pixel, where it reads fragments
  const int row = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
  const uint32_t dy_from = mine + kDyAt + WorkRow::offset(0, row + 8 * low, high);
  const uint32_t a_from = mine + kAAt + WorkRow::offset(0, row + 8 * high, low);

  Tile sum[3];
  sum[0].clear(), sum[1].clear(), sum[2].clear();
  RowFragments dy[3], a;
  int slot = 0;
  for (int strip = strips.first; strip < strips.end; ++strip) {
    dy[0].clear(), dy[1].clear(), dy[2].clear(), a.clear();
    for (int first = 0; first < kSteps; first += 3) {
#pragma unroll
      for (int turn = 0; turn < 3; ++turn) {
        const int step = first + turn, y = strip % kStrips * kStripRows - 1 + step;
        if (step < kSteps) {
          wait_for_copies<kRing - 1>();
          const uint32_t raw = mine + slot * kRawBytes;
          const bool has_dy = step > 0 && step <= kStripRows;
          const bool has_a = step <= kStripRows + 1 && y >= 0 && y < kSize;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            Pairs v(load_shared_16_bytes(raw + (j * 32 + lane) * 16));
            const Pairs raw_y(load_shared_16_bytes(raw + kRowBytes + (j * 32 + lane) * 16));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              v.v[i] = T::pack(
                  fused_multiply_add(
                      a_dz[2 * i], T::low(v.v[i]),
                      fused_multiply_add(b_y[2 * i], T::low(raw_y.v[i]), c_1[2 * i])),
                  fused_multiply_add(
                      a_dz[2 * i + 1], T::high(v.v[i]),
                      fused_multiply_add(b_y[2 * i + 1], T::high(raw_y.v[i]), c_1[2 * i + 1])));
            }
            store_shared(mine + kDyAt + WorkRow::offset(0, (j * 32 + lane) / 2, lane & 1),
                         v.chunk());
          }
          uint2 pixel = load_shared_8_bytes(raw + 2 * kRowBytes + lane * 8);
          pixel.y &= 0x0000ffffu;  // the fourth channel is none of the image's
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {  // under tap kx of output pixel x
            const int x = lane + 1 - kx;
            if (x >= 0 && x < kSize) {
              store_shared(mine + kAAt + WorkRow::offset(0, x, kx >> 1) + (kx & 1) * 8, pixel);
            }
          }
          warp_barrier();  // the rows are there
          if (has_dy) {
            dy[turn].load(dy_from);
          } else {
            dy[turn].clear();
          }
          // a is still the row before
#pragma unroll
          for (int ky = 0; ky < 3; ++ky) {
            const RowFragments& from = dy[(turn + 3 - ky) % 3];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              sum[ky].template add_product<T>(
                  a.v[i], make_uint4(from.v[i][0], from.v[i][1], from.v[i][2], from.v[i][3]));
            }
          }
          if (has_a) {
            a.load(a_from);
          } else {
            a.clear();
          }
          warp_barrier();  // the rows have been read
          load();
          slot = (slot + 1) % kRing;
        }
      }
    }
  }
  wait_for_copies<0>();
  block_barrier();  // every warp is through: its memory is free

  // the warps add to dweight in shared memory one after the other, so in a fixed order
  const int g = lane >> 2, t = lane & 3;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int i = 0; i < 12; ++i) {
        const int ky = i / 4, half = i % 2, eight = i / 2 % 2;
        const int channel = g + 8 * half, kx = channel / 4, c = channel % 4;
        if (kx < 3) {
          const uint32_t to =
              start + kWarpsAt + (((ky * 3 + kx) * 4 + c) * 16 + eight * 8 + 2 * t) * 4;
          float first = sum[ky].v[eight][2 * half], second = sum[ky].v[eight][2 * half + 1];
          if (turn > 0) {
            const uint2 old = load_shared_8_bytes(to);
            first += as_float(old.x), second += as_float(old.y);
          }
          store_shared(to, make_uint2(as_bits(first), as_bits(second)));
        }
      }
    }
    block_barrier();  // this warp's turn is over
  }
  for (int i = thread_index() * 4; i < kSlabElements; i += kThreads * 4) {
    store_16_bytes(p.slabs + block_index() * kSlabElements + i,
                   load_shared_16_bytes(start + kWarpsAt + i * 4));
  }
}

// ---- slabs alone ----

__global__ void __launch_bounds__(kThreads) sum_slabs_kernel(SlabSum slabs) {
  let_next_kernel_start();
  wait_for_kernel_before();
  add_slabs_together<kWarps>(slabs);
}

}  // namespace

int stem_forward(const StemForwardParams& p, Dtype dtype, int blocks, bool overlap, void* stream) {
  const LaunchShape shape = {blocks, kThreads, kWarps * kWarpSumBytes, overlap, stream};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return p.bias != nullptr ? launch(stem_forward_kernel<T, true>, p, shape)
                             : launch(stem_forward_kernel<T, false>, p, shape);
  });
}

int stem_backward(const StemBackwardParams& p, Dtype dtype, int blocks, bool overlap,
                  void* stream) {
  const LaunchShape shape = {blocks, kThreads, kBackwardBytes, overlap, stream};
  return with_type(
      dtype, [&](auto type) { return launch(stem_backward_kernel<decltype(type)>, p, shape); });
}

int sum_slabs(const SlabSum& slabs, int blocks, bool overlap, void* stream) {
  return launch(sum_slabs_kernel, slabs, {blocks, kThreads, kWarps * 64, overlap, stream});
}

}  // namespace cifar_resnet_fast
