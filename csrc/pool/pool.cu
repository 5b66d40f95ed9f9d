// Last activation and average pool, forward and backward; pool.h says what they compute.
//
// A warp works alone, on whole images: lane l has the 8 channels of chunk l % 8 of the pixels
// l / 8, l / 8 + 4, ..., 16 pixels. If there are no more images than blocks, the warps of a block
// work together on one: such a lane has 2 of these pixels, and waits for memory once. The
// activation itself is not kept: its gradient needs no more than whether it is positive, one bit a
// value.
#include "common/launch.cuh"
#include "common/norm.cuh"
#include "common/row_layout.cuh"
#include "common/shapes.cuh"
#include "pool/pool.h"

namespace cifar_resnet_fast {
namespace {

constexpr int C = 64, kWarps = 8, kThreads = kWarps * 32, kPixels = 64, kLanePixels = kPixels / 4;
constexpr int kScratchAt = 2 * C * 4;
constexpr int kForwardBytes = kScratchAt + merge_bytes<C, kThreads>();
constexpr int kBackwardBytes = kWarps * 2 * C * 4;
static_assert(kWarps * C * 4 <= merge_bytes<C, kThreads>());  // the warps' sums of an image

// The images of a warp, and its pixels of each.
template <bool TOGETHER>
struct Work {
  static constexpr int kPixelsHere = TOGETHER ? kLanePixels / kWarps : kLanePixels;
  Share images;
  int first_pixel;
  DEVICE Work(int count, int warp, int lane)
      : images(count, TOGETHER ? block_index() : block_index() * kWarps + warp,
               TOGETHER ? block_count() : block_count() * kWarps),
        first_pixel((lane >> 3) + (TOGETHER ? warp * kPixelsHere * 4 : 0)) {}
};

template <class T, bool TOGETHER>
__global__ void __launch_bounds__(kThreads, 2) pool_forward_kernel(PoolForwardParams p) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31, chunk = lane & 7;
  const uint32_t start = shared_start();
  let_next_kernel_start();
  wait_for_kernel_before();
  forward_coefficients<C, kThreads>(p.bn, static_cast<double>(p.batch) * kPixels, start,
                                    start + kScratchAt);
  block_barrier();  // coefficients are there
  float scale[8], shift[8];
  load_8_floats(start + chunk * 32, scale);
  load_8_floats(start + C * 4 + chunk * 32, shift);

  // option A: of [16, 16, 32], every second pixel; channels 16 .. 47 are its 0 .. 31
  const bool option_a = p.shortcut_kind == Shortcut::kOptionA;
  const bool adds = !option_a || (chunk >= 2 && chunk < 6);
  const Work<TOGETHER> work(p.batch, warp, lane);
  for (int image = work.images.first; image < work.images.end; ++image) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (int i = 0; i < work.kPixelsHere; ++i) {
      const int pixel = work.first_pixel + 4 * i;
      const int at = image * Stage<C>::kImageBytes + pixel * 128 + chunk * 16;
      const int from = option_a ? image * Stage<32>::kImageBytes + pixel / 8 * 2 * kRowBytes +
                                      pixel % 8 * 128 + (chunk - 2) * 16
                                : at;
      const Pairs y(load_16_bytes(static_cast<const char*>(p.y) + at));
      const Pairs shortcut(adds ? load_16_bytes(static_cast<const char*>(p.shortcut) + from)
                                : make_uint4(0, 0, 0, 0));
      unsigned bits = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float low =
            fused_multiply_add(scale[2 * k], T::low(y.v[k]), shift[2 * k]) + T::low(shortcut.v[k]);
        const float high =
            fused_multiply_add(scale[2 * k + 1], T::high(y.v[k]), shift[2 * k + 1]) +
            T::high(shortcut.v[k]);
        sum[2 * k] += relu(low);
        sum[2 * k + 1] += relu(high);
        bits |= (low > 0 ? 1u : 0u) << (2 * k) | (high > 0 ? 2u : 0u) << (2 * k);
      }
      store_byte(p.mask + (image * kPixels + pixel) * 8 + chunk, bits);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sum[k] += shuffle_xor(sum[k], 8);
      sum[k] += shuffle_xor(sum[k], 16);
      if (lane >= 8) continue;
      if (TOGETHER) {
        store_shared(start + kScratchAt + (warp * C + chunk * 8 + k) * 4, sum[k]);
      } else {
        store_float(p.pooled + image * C + chunk * 8 + k, sum[k] * (1.0f / kPixels));
      }
    }
    if (!TOGETHER) continue;
    block_barrier();  // the warps' sums are there
    if (thread_index() < C) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total += load_shared_float(start + kScratchAt + (w * C + thread_index()) * 4);
      }
      store_float(p.pooled + image * C + thread_index(), total * (1.0f / kPixels));
    }
    block_barrier();  // and have been read
  }
}

template <class T, bool TOGETHER>
__global__ void __launch_bounds__(kThreads, 2) pool_backward_kernel(PoolBackwardParams p) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31, chunk = lane & 7;
  let_next_kernel_start();
  wait_for_kernel_before();
  float first[8] = {0, 0, 0, 0, 0, 0, 0, 0}, second[8] = {0, 0, 0, 0, 0, 0, 0, 0}, mean[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) mean[k] = load_float(p.norm + chunk * 8 + k);
  const Work<TOGETHER> work(p.batch, warp, lane);
  for (int image = work.images.first; image < work.images.end; ++image) {
    float gradient[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      gradient[k] = load_float(p.dpooled + image * C + chunk * 8 + k) * (1.0f / kPixels);
    }
    // as they are stored: all pixels of a channel err alike, and the sums must not miss that
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      const uint32_t rounded = T::pack(gradient[k], gradient[k + 1]);
      gradient[k] = T::low(rounded);
      gradient[k + 1] = T::high(rounded);
    }
#pragma unroll 4
    for (int i = 0; i < work.kPixelsHere; ++i) {
      const int pixel = work.first_pixel + 4 * i;
      const int at = image * Stage<C>::kImageBytes + pixel * 128 + chunk * 16;
      const Pairs y(load_16_bytes(static_cast<const char*>(p.y) + at));
      const unsigned bits = load_byte(p.mask + (image * kPixels + pixel) * 8 + chunk);
      Pairs dz(make_uint4(0, 0, 0, 0));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float low = bits >> (2 * k) & 1 ? gradient[2 * k] : 0;
        const float high = bits >> (2 * k) & 2 ? gradient[2 * k + 1] : 0;
        first[2 * k] += low;
        first[2 * k + 1] += high;
        second[2 * k] = fused_multiply_add(low, T::low(y.v[k]) - mean[2 * k], second[2 * k]);
        second[2 * k + 1] =
            fused_multiply_add(high, T::high(y.v[k]) - mean[2 * k + 1], second[2 * k + 1]);
        dz.v[k] = T::pack(low, high);
      }
      store_16_bytes(static_cast<char*>(p.dz) + at, dz.chunk());
    }
  }
  const uint32_t mine = shared_start() + warp * 2 * C * 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int mask = 8; mask < 32; mask <<= 1) {
      first[k] += shuffle_xor(first[k], mask);
      second[k] += shuffle_xor(second[k], mask);
    }
    if (lane < 8) {
      store_shared(mine + (chunk * 8 + k) * 4, first[k]);
      store_shared(mine + (C + chunk * 8 + k) * 4, second[k]);
    }
  }
  block_barrier();  // the warps' sums are there
  for (int i = thread_index(); i < 2 * C; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += load_shared_float(shared_start() + (w * 2 * C + i) * 4);
    }
    store_float(p.dz_sums + block_index() * 2 * C + i, sum);
  }
}

}  // namespace

int pool_forward(const PoolForwardParams& p, Dtype dtype, int blocks, bool overlap, void* stream) {
  const LaunchShape shape = {blocks, kThreads, kForwardBytes, overlap, stream};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return p.batch <= blocks ? launch(pool_forward_kernel<T, true>, p, shape)
                             : launch(pool_forward_kernel<T, false>, p, shape);
  });
}

int pool_backward(const PoolBackwardParams& p, Dtype dtype, int blocks, bool overlap,
                  void* stream) {
  const LaunchShape shape = {blocks, kThreads, kBackwardBytes, overlap, stream};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return p.batch <= blocks ? launch(pool_backward_kernel<T, true>, p, shape)
                             : launch(pool_backward_kernel<T, false>, p, shape);
  });
}

}  // namespace cifar_resnet_fast
