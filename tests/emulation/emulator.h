// A CPU stand-in for csrc/common/warp.cuh and launch.cuh, so that the kernels' own source runs in
// the tests: a lane is a fiber, blocks run one after the other.
//
// What it finds beside wrong results:
//   * a missing barrier: the order in which warps advance is a parameter (`set_order`), and a warp
//     runs on until a barrier stops it;
//   * a missing wait: nobody may touch the destination of an asynchronous copy until then;
//   * shared memory that is read before it is written: it starts as NaN;
//   * races in shared memory: a write and another lane's access with no barrier, of the warp or of
//     more, between them; shuffles and matrix instructions order nothing;
//   * races between blocks: a value that one block writes and another touches;
//   * lanes of a warp that meet in different instructions, and part of a warp at a barrier;
//   * access outside the tensors named by `allow`, outside shared memory, or misaligned;
//   * where kernels overlap: global memory, other than constants, touched before the wait for the
//     kernel before, constants that are written, and lanes that never wait;
//   * deadlocks, and barriers that name other numbers of lanes.
// What it cannot find: what else kernels do to each other, and what compiler and card make of it.
#ifndef CIFAR_RESNET_FAST_WARP_CUH_
#define CIFAR_RESNET_FAST_WARP_CUH_
#define CIFAR_RESNET_FAST_LAUNCH_CUH_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "engine.h"

#define DEVICE inline
#define HOST_DEVICE inline
#define __device__
#define __forceinline__
#define __global__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}

namespace cifar_resnet_fast {

// ---- what emulator.cpp does ----

int thread_index();
int block_index();
int block_count();
unsigned block_row();
unsigned block_rows();
enum class Access { kRead, kWrite, kReadConstant };
void* checked_global(const void* p, size_t bytes, Access access);
// by the running lane, or by one of the 32 of its warp
unsigned char* checked_shared(uint32_t address, size_t bytes, Access access);
unsigned char* checked_shared(uint32_t address, size_t bytes, Access access, int lane);
void barrier(int id, int lanes);
void warp_barrier();
void wait_for_kernel_before();
void copy_async(uint32_t to, const void* from, int bytes, bool valid);
void commit_copies();
void wait_for_copies_but(int groups);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float v);

// What a lane brings to an instruction of its whole warp, and what it takes from it.
struct Operands {
  uint32_t a[4], b[2], address;
  float c[4];
};
// Lends a lane's operands to the warp; the last lane to come runs `act` on those of all 32.
void with_whole_warp(Operands& mine, void (*act)(Operands* const* lanes));

struct LaunchShape {
  int blocks;
  int threads;
  int shared_bytes;
  bool overlap;
  void* stream;
  int rows = 1;
};
// 0; throws what the checks above find
int run_blocks(const LaunchShape& shape, const std::function<void()>& kernel);

template <class Params>
int launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape) {
  return run_blocks(shape, [&] { kernel(params); });
}

// ---- the functions of warp.cuh ----

inline uint32_t shared_start() {
  return 0;
}

template <class T>
T load_global(const void* p, Access access = Access::kRead) {
  T v;
  std::memcpy(&v, checked_global(p, sizeof v, access), sizeof v);
  return v;
}
template <class T>
void store_global(void* p, T v) {
  std::memcpy(checked_global(p, sizeof v, Access::kWrite), &v, sizeof v);
}
inline uint4 load_16_bytes(const void* p) {
  return load_global<uint4>(p);
}
inline uint4 load_16_bytes_constant(const void* p) {
  return load_global<uint4>(p, Access::kReadConstant);
}
template <class V>
V load_read_only(const V* p) {
  return load_global<V>(p);
}
inline uint2 load_8_bytes(const void* p) {
  return load_global<uint2>(p);
}
inline uint32_t load_4_bytes(const void* p) {
  return load_global<uint32_t>(p);
}
inline float load_float(const float* p) {
  return load_global<float>(p);
}
inline unsigned load_byte(const unsigned char* p) {
  return load_global<unsigned char>(p);
}
inline void store_byte(unsigned char* p, unsigned v) {
  store_global(p, static_cast<unsigned char>(v));
}
template <class V>
void store(V* p, V v) {
  store_global(p, v);
}
inline void store_float(float* p, float v) {
  store_global(p, v);
}
inline void store_16_bytes(void* p, uint4 v) {
  store_global(p, v);
}
inline void store_8_bytes(void* p, uint2 v) {
  store_global(p, v);
}

inline void copy_16_bytes_async(uint32_t to, const void* from, bool valid = true) {
  copy_async(to, from, 16, valid);
}
inline void copy_8_bytes_async(uint32_t to, const void* from, bool valid) {
  copy_async(to, from, 8, valid);
}
template <bool LAST>
inline void copy_16_bytes_async(uint32_t to, const void* from, bool valid) {
  copy_async(to, from, 16, valid);
}
template <bool LAST>
inline void copy_8_bytes_async(uint32_t to, const void* from, bool valid) {
  copy_async(to, from, 8, valid);
}
template <int N>
void wait_for_copies() {
  wait_for_copies_but(N);
}

template <class T>
void store_shared(uint32_t a, T v) {
  std::memcpy(checked_shared(a, sizeof v, Access::kWrite), &v, sizeof v);
}
template <class T>
T load_shared(uint32_t a) {
  T v;
  std::memcpy(&v, checked_shared(a, sizeof v, Access::kRead), sizeof v);
  return v;
}
inline uint4 load_shared_16_bytes(uint32_t a) {
  return load_shared<uint4>(a);
}
inline uint2 load_shared_8_bytes(uint32_t a) {
  return load_shared<uint2>(a);
}
inline float load_shared_float(uint32_t a) {
  return load_shared<float>(a);
}

template <bool TRANSPOSED>
void load_four_matrices(uint32_t (&m)[4], uint32_t row) {
  Operands mine;
  mine.address = row;
  with_whole_warp(mine, [](Operands* const* lanes) {
    uint16_t element[4][8][8];
    for (int i = 0; i < 32; ++i) {
      std::memcpy(element[i / 8][i % 8], checked_shared(lanes[i]->address, 16, Access::kRead, i),
                  16);
    }
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4;
      for (int k = 0; k < 4; ++k) {
        const uint32_t first = TRANSPOSED ? element[k][2 * t][g] : element[k][g][2 * t];
        const uint32_t second = TRANSPOSED ? element[k][2 * t + 1][g] : element[k][g][2 * t + 1];
        lanes[i]->a[k] = first | second << 16;
      }
    }
  });
  std::memcpy(m, mine.a, sizeof m);
}
inline void load_matrices(uint32_t (&m)[4], uint32_t row) {
  load_four_matrices<false>(m, row);
}
inline void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
  load_four_matrices<true>(m, row);
}

inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t kept(uint32_t address) {
  return address;
}
inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

// c += a b for a whole warp, in fp32, each sum over k from 0 to 15
template <class T>
void multiply_warp(Operands* const* lanes) {
  float a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    for (int k = 0; k < 4; ++k) {
      a[g + 8 * (k & 1)][2 * t + 8 * (k >> 1)] = T::low(lanes[i]->a[k]);
      a[g + 8 * (k & 1)][2 * t + 8 * (k >> 1) + 1] = T::high(lanes[i]->a[k]);
    }
    for (int k = 0; k < 2; ++k) {
      b[2 * t + 8 * k][g] = T::low(lanes[i]->b[k]);
      b[2 * t + 8 * k + 1][g] = T::high(lanes[i]->b[k]);
    }
  }
  float c[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int k = 0; k < 4; ++k) lanes[i]->c[k] += c[i / 4 + 8 * (k >> 1)][2 * (i % 4) + (k & 1)];
  }
}
template <class T>
void multiply_add_in_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.c, c, sizeof c);
  mine.b[0] = b0;
  mine.b[1] = b1;
  with_whole_warp(mine, multiply_warp<T>);
  std::memcpy(c, mine.c, sizeof c);
}

struct BFloat16 {
  static float low(uint32_t pair) { return as_float(pair << 16); }
  static float high(uint32_t pair) { return as_float(pair & 0xffff0000u); }
  static uint32_t round(float v) {
    const uint32_t bits = as_bits(v);
    if (std::isnan(v)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t positive(uint32_t pair) {
    return (low(pair) > 0 ? 0xffffu : 0) | (high(pair) > 0 ? 0xffff0000u : 0);
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_in_warp<BFloat16>(c, a, b0, b1);
  }
};

struct Float16 {
  static float low(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
  static float high(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }
  static uint32_t positive(uint32_t pair) {
    return (low(pair) > 0 ? 0xffffu : 0) | (high(pair) > 0 ? 0xffff0000u : 0);
  }
  static uint32_t pack(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
  }
  static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_in_warp<Float16>(c, a, b0, b1);
  }
};

inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float relu(float v) {
  return v > 0 || std::isnan(v) ? v : 0.0f;
}

inline float shuffle_xor(float v, int mask) {
  Operands mine;
  mine.c[0] = v;
  mine.address = mask;
  with_whole_warp(mine, [](Operands* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->c[1] = lanes[i ^ lanes[i]->address]->c[0];
  });
  return mine.c[1];
}
void block_barrier();
template <int WARPS>
void group_barrier(int id) {
  barrier(id, WARPS * 32);
}

inline void let_next_kernel_start() {}

}  // namespace cifar_resnet_fast

#endif  // CIFAR_RESNET_FAST_WARP_CUH_
