// The option-A shortcut's index arithmetic and launcher. Torch-free; the CUDA kernels and their
// CPU twins both find every element through the two maps below, so that a test of one tests the
// other.
//
// An activation is channels-last: N images, each a row-major [pixels, channels] array. It is moved
// in chunks: 16 bytes where all channel counts and addresses allow, else one element. Channels and
// offsets inside an image are counted in chunks and fit in 31 bits; offsets between images in 64.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace cifar_resnet_fast {

// Division of n < 2^31 by a divisor known at launch: a multiplication and a shift in place of some
// twenty instructions. Source: Granlund and Montgomery 1994, figure 4.1.
struct Divisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - d;
    multiplier = static_cast<uint32_t>((excess << 32) / d + 1);
  }

  HOST_DEVICE uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32);
#endif
    return (high + n) >> shift;
  }
};

// Shapes of x [N, H, W, C] and of the shortcut [N, Ho, Wo, K], Ho = ceil(H / stride).
struct ShortcutA {
  int64_t N;
  uint32_t stride_log2;                                 // 0 or 1
  uint32_t W, Wo;                                       // pixels a row
  uint32_t x_pixels, out_pixels;                        // an image
  uint32_t x_channels, out_channels, leading_channels;  // C, K and the zeros in front, in chunks
  Divisor by_W, by_Wo, by_x_channels, by_out_channels;

  HOST_DEVICE uint32_t x_chunks() const { return x_pixels * x_channels; }
  HOST_DEVICE uint32_t out_chunks() const { return out_pixels * out_channels; }
};

inline ShortcutA make_shortcut_a(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K,
                                 int64_t stride, int64_t elements_per_chunk) {
  const int64_t Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride;
  ShortcutA s;
  s.N = N;
  s.stride_log2 = static_cast<uint32_t>(stride - 1);
  s.W = static_cast<uint32_t>(W);
  s.Wo = static_cast<uint32_t>(Wo);
  s.x_pixels = static_cast<uint32_t>(H * W);
  s.out_pixels = static_cast<uint32_t>(Ho * Wo);
  s.x_channels = static_cast<uint32_t>(C / elements_per_chunk);
  s.out_channels = static_cast<uint32_t>(K / elements_per_chunk);
  s.leading_channels = (s.out_channels - s.x_channels) / 2;
  s.by_W = Divisor(s.W);
  s.by_Wo = Divisor(s.Wo);
  s.by_x_channels = Divisor(s.x_channels);
  s.by_out_channels = Divisor(s.out_channels);
  return s;
}

constexpr uint32_t kNowhere = 0xffffffffu;

// Forward: which chunk of x's image the chunk of the shortcut's image repeats, kNowhere where
// zero.
HOST_DEVICE uint32_t chunk_in_x(const ShortcutA& s, uint32_t out_chunk) {
  const uint32_t pixel = s.by_out_channels.quotient(out_chunk);
  // a new channel in front wraps round to a large number and fails the same comparison
  const uint32_t channel = out_chunk - pixel * s.out_channels - s.leading_channels;
  if (channel >= s.x_channels) return kNowhere;
  const uint32_t ho = s.by_Wo.quotient(pixel), wo = pixel - ho * s.Wo;
  const uint32_t x_pixel = (ho << s.stride_log2) * s.W + (wo << s.stride_log2);
  return x_pixel * s.x_channels + channel;
}

// Backward: which chunk of the shortcut's image repeats the chunk of x's image, kNowhere where
// none.
HOST_DEVICE uint32_t chunk_in_out(const ShortcutA& s, uint32_t x_chunk) {
  const uint32_t pixel = s.by_x_channels.quotient(x_chunk);
  const uint32_t channel = x_chunk - pixel * s.x_channels + s.leading_channels;
  const uint32_t h = s.by_W.quotient(pixel), w = pixel - h * s.W;
  if ((h | w) & s.stride_log2) return kNowhere;  // stride 2: an odd row or column
  const uint32_t out_pixel = (h >> s.stride_log2) * s.Wo + (w >> s.stride_log2);
  return out_pixel * s.out_channels + channel;
}

struct ShortcutAParams {
  ShortcutA shape;
  const void* from;  // x, or dout
  void* to;          // the shortcut, or dx
};

// out = shortcut_a(x), or with `backward` dx from dout: a gather in both directions, every chunk
// of the result written once. chunk_bytes: 2, 4, 8 or 16. Returns 0 or a cudaError_t.
int launch_shortcut_a(const ShortcutAParams& p, bool backward, size_t chunk_bytes, void* stream);

}  // namespace cifar_resnet_fast
