// Batch normalisation's coefficients from sums over the batch, made in a kernel's prologue.
//
// Every block does the same arithmetic in the same order, so all blocks, and all runs, agree to
// the bit; block 0 also writes what others need. A row of sums comes from one block of the kernel
// before, itself added up in float32 from at most a few hundred values a lane. A thread adds a few
// rows, and then a few threads' parts, in float32; the rest, and E[y*y] - E[y]^2, is float64, of
// which sm_86 does two lanes a clock while the whole block waits. What cancels is then the
// rounding of float32 sums, about 1e-7 of E[y*y]: for mean / std = 100 that is 0.1 % of the
// variance, where y itself, rounded to bfloat16, is off by a fifth of the standard deviation.
#pragma once

#include "common/params.h"
#include "common/warp.cuh"

namespace cifar_resnet_fast {

// shared memory that merge_sums needs with so many threads, in bytes
template <int C, int THREADS>
constexpr int merge_bytes() {
  return 2 * C * 4 * (THREADS * 2 / C < 32 ? THREADS * 2 / C : 32);
}

struct SumPair {
  double first, second;
};

// 1 / count to 1e-14: one step of Newton's method from the float32 quotient, two instructions of
// float64 in place of a division's dozen.
DEVICE double reciprocal(double count) {
  const double guess = 1 / static_cast<float>(count);
  return guess * (2 - count * guess);
}

// The two sums of channel c = thread index (0 in threads from C on), over `rows` rows. A thread
// adds up rows i, i + PARTS, ... of four columns; then thread c adds the parts, four at a time in
// float32 before float64. Meets one block barrier.
template <int C, int THREADS>
DEVICE SumPair merge_sums(const float* sums, int rows, uint32_t scratch) {
  constexpr int kColumns = C / 2;  // of four floats
  constexpr int kParts = THREADS / kColumns < 32 ? THREADS / kColumns : 32;
  constexpr int kInFlight = 6;
  const int thread = thread_index();
  if (thread < kParts * kColumns) {
    const int column = thread % kColumns, part = thread / kColumns;
    float sum[4] = {0, 0, 0, 0};
    for (int row = part; row < rows; row += kParts * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (row + i * kParts < rows) {
          v[i] = load_16_bytes(sums + (row + i * kParts) * 2 * C + column * 4);
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        sum[0] += as_float(v[i].x), sum[1] += as_float(v[i].y);
        sum[2] += as_float(v[i].z), sum[3] += as_float(v[i].w);
      }
    }
    store_shared(scratch + (part * 2 * C + column * 4) * 4,
                 make_uint4(as_bits(sum[0]), as_bits(sum[1]), as_bits(sum[2]), as_bits(sum[3])));
  }
  block_barrier();  // the parts are there
  SumPair total = {0, 0};
  if (thread < C) {
    constexpr int kTogether = 4;
    static_assert(kParts % kTogether == 0);
#pragma unroll
    for (int first = 0; first < kParts; first += kTogether) {
      float some_first = 0, some_second = 0;
#pragma unroll
      for (int part = first; part < first + kTogether; ++part) {
        some_first += load_shared_float(scratch + (part * 2 * C + thread) * 4);
        some_second += load_shared_float(scratch + (part * 2 * C + C + thread) * 4);
      }
      total.first += some_first;
      total.second += some_second;
    }
  }
  return total;
}

// Puts scale [C] and shift [C] at `coefficients`; the caller's next block barrier shows them to
// all. What is needed besides the sums is loaded first, so that both are on their way at once.
template <int C, int THREADS>
DEVICE void forward_coefficients(const BatchNormForward& bn, double count, uint32_t coefficients,
                                 uint32_t scratch) {
  const int c = thread_index();
  float weight = 0, bias = 0, old_mean = 0, old_var = 0;
  if (c < C) {
    weight = load_float(bn.weight + c), bias = load_float(bn.bias + c);
    if (block_index() == 0) {
      old_mean = load_float(bn.running_mean + c), old_var = load_float(bn.running_var + c);
    }
  }
  const SumPair sum = merge_sums<C, THREADS>(bn.sums, bn.rows, scratch);
  if (c >= C) return;
  const double each = reciprocal(count), mean = sum.first * each;
  const double difference = sum.second * each - mean * mean;
  const float variance = difference < 0 ? 0 : static_cast<float>(difference);  // keeps a NaN
  const float invstd = 1 / sqrtf(variance + bn.eps);
  const float scale = weight * invstd;
  const float shift = fused_multiply_add(-static_cast<float>(mean), scale, bias);
  store_shared(coefficients + c * 4, scale);
  store_shared(coefficients + (C + c) * 4, shift);
  if (block_index() != 0) return;
  store_float(bn.norm + c, static_cast<float>(mean));
  store_float(bn.norm + C + c, invstd);
  store_float(bn.norm + 2 * C + c, scale);
  store_float(bn.norm + 3 * C + c, shift);
  const float unbiased = fused_multiply_add(variance, 1 / static_cast<float>(count - 1), variance);
  store_float(bn.running_mean + c, old_mean + bn.momentum * (static_cast<float>(mean) - old_mean));
  store_float(bn.running_var + c, old_var + bn.momentum * (unbiased - old_var));
}

// Puts A [C], B [C], C [C] of dy = A * dz + B * y + C at `coefficients`, likewise.
template <int C, int THREADS>
DEVICE void backward_coefficients(const BatchNormBackward& bn, double count, uint32_t coefficients,
                                  uint32_t scratch) {
  const int c = thread_index();
  float mean = 0, invstd = 0, weight = 0;
  if (c < C) {
    mean = load_float(bn.norm + c), invstd = load_float(bn.norm + C + c);
    weight = load_float(bn.weight + c);
  }
  const SumPair sum = merge_sums<C, THREADS>(bn.sums, bn.rows, scratch);
  if (c >= C) return;
  const double sum_dz_yhat = sum.second * invstd;
  const double each = reciprocal(count), m1 = sum.first * each, m2 = sum_dz_yhat * each;
  const double a = static_cast<double>(weight) * invstd;
  const double b = -a * invstd * m2;
  store_shared(coefficients + c * 4, static_cast<float>(a));
  store_shared(coefficients + (C + c) * 4, static_cast<float>(b));
  store_shared(coefficients + (2 * C + c) * 4, static_cast<float>(-a * m1 - b * mean));
  if (block_index() != 0) return;
  store_float(bn.dweight + c, static_cast<float>(sum_dz_yhat));
  store_float(bn.dbias + c, static_cast<float>(sum.first));
}

}  // namespace cifar_resnet_fast
