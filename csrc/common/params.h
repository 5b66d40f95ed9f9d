// What the kernels' arguments have in common, for code that knows nothing of CUDA.
//
// All functions that launch a kernel queue their work on `stream` (a cudaStream_t) and return a
// status: 0, a positive cudaError_t, or a negative BadArgument. They check what would read or
// write out of bounds, nothing else.
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

enum BadArgument : int {
  kBadImages = -1,
  kBadShape = -2,
  kBadBlocks = -3,
  kBadShortcut = -4,
  kBadPointer = -5,
};

inline const char* bad_argument_text(int status) {
  switch (status) {
    case kBadImages:
      return "images must be 1 .. 65535";
    case kBadShape:
      return "channels must be 16, 32 or 64 at stride 1, and 16 or 32 at stride 2";
    case kBadBlocks:
      return "blocks must be at least 1";
    case kBadShortcut:
      return "the shortcut must be of the same stage or, with more than 16 channels, option A's";
    case kBadPointer:
      return "a pointer that the kernel needs is null";
    default:
      return "unknown status";
  }
}

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
