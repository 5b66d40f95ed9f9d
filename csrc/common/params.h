// What the kernels' arguments have in common, for code that knows nothing of CUDA.
//
// All functions that launch a kernel queue their work on `stream` (a cudaStream_t) and return a
// status: 0, a positive cudaError_t, or kNoKernel. They check nothing else: bindings/ does, before
// it calls them. `batch` is 1 .. 65535, so that offsets in bytes fit in 31 bits, and `blocks` at
// least 1.
//
// Activations are channels-last 16-bit tensors, 16-byte aligned, of one of three stages:
//   stage 1: [N, 32, 32, 16]    stage 2: [N, 16, 16, 32]    stage 3: [N, 8, 8, 64]
// y is a raw output of a convolution, x a finished activation (normalised, shortcut added, ReLU),
// dz the gradient with respect to the output of a batch normalisation, masked by the ReLU behind
// it. "Sums" are one row of 2 * channels floats for each block of the kernel that wrote them; the
// next kernel merges them in its prologue, every block for itself and in the same order.
#pragma once

namespace cifar_resnet_fast {

enum class Dtype { kFloat16, kBFloat16 };

// what a function returns that has no kernel compiled for such channels and stride
constexpr int kNoKernel = -1;

// Batch normalisation of y from sums of y and y * y. Block 0 writes `norm` and the running
// values.
struct BatchNormForward {
  const float* sums;    // [rows, 2, C]
  int rows;             // blocks of the kernel that wrote them
  const float* weight;  // [C]
  const float* bias;    // [C]
  float* running_mean;  // [C], updated in place
  float* running_var;   // [C], updated in place with the unbiased variance
  float* norm;          // [4, C] mean, invstd, scale, shift; for the backward pass
  float momentum;       // weight of this batch in the running values
  float eps;
};

// Gradient of that batch normalisation from sums of dz and dz * (y - mean). Block 0 writes
// dweight and dbias.
struct BatchNormBackward {
  const float* sums;    // [rows, 2, C]
  int rows;             // blocks of the kernel that wrote them
  const float* weight;  // [C]
  const float* norm;    // [4, C] as written in the forward pass
  float* dweight;       // [C]
  float* dbias;         // [C]
};

// Of a convolution's weight and of its gradient, fp32.
enum class WeightLayout {
  kContiguous,    // [K, C, 3, 3]
  kChannelsLast,  // [K, 3, 3, C]
};

// Weight gradient left over from the kernel before: slabs, one a block, to be added up.
struct SlabSum {
  const float* slabs;  // [count, 9, C, K]; null: nothing is left over
  int count;
  int C;           // a multiple of 4
  int K;           // a multiple of 4
  int C_kept;      // channels of the weight; the slabs' further ones are padding
  float* dweight;  // of a weight [K, C_kept, 3, 3], written
  WeightLayout layout;
};

enum class Shortcut {
  kNone,      // nothing is added
  kIdentity,  // of the stage of y
  kOptionA,   // of the stage before: every second pixel, new channels zero, half of them in front
};

}  // namespace cifar_resnet_fast
