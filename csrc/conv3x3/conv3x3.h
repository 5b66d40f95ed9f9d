// The 3x3 convolutions of the blocks, for code that knows nothing of CUDA; common/params.h has the
// vocabulary.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

// The kernels of a basic block in training, with the codes that torch's operators and the
// prototypes have for them:
//   forward_first    F1  x = relu(norm(y) + shortcut); out = conv(x)
//   forward_second   F2  out = conv(relu(norm(y)))
//   backward_second  B2  a = relu(norm(input)); out = conv_T(dy) where a > 0, else 0
//   backward_first   B1  a = input; out = conv_T(dy) + residual where a > 0, else 0
// dy is the gradient of y = conv(a) through its batch normalisation, from dz; both backward
// kernels make slabs of dweight, the sum over pixels of a times dy. At stride 2 the residual is
// option A's.

// forward_first, or forward_second if x is null
struct ForwardParams {
  const void* y;         // input of the normalisation, raw
  BatchNormForward bn;   // of y
  const void* shortcut;  // forward_first: as shortcut_kind says
  Shortcut shortcut_kind;
  void* x;                // written, of the shape of y; or null
  const void* fragments;  // forward, see weights.h
  void* out;              // raw output
  float* out_sums;        // [blocks, 2, output channels] of out and out * out
  int batch;
};

// backward_first, or backward_second if residual is null
struct BackwardParams {
  const void* dz;
  const void* y;
  BatchNormBackward bn;      // of y
  const void* input;         // backward_first: finished; backward_second: raw
  const void* residual;      // dz of the block's output; or null
  const void* y_before;      // raw input of the normalisation that made the input; null if that is
                             // input itself
  const float* norm_before;  // [4, C] of that normalisation
  const void* fragments;     // backward, see weights.h
  void* out;                 // dz of the normalisation that made the input
  float* out_sums;           // [slab rows, 2, C] of out and out * (y_before - mean)
  float* slabs;              // [slab rows, 9, C, K]
  SlabSum before;
  int batch;
};

// Evaluation: out = relu(conv(x) + bias + shortcut), with the normalisation folded into weight and
// bias (weights.h). All activations are finished.
struct EvaluateParams {
  const void* x;
  const void* fragments;  // forward, folded
  const float* bias;      // [output channels]
  const void* shortcut;   // as shortcut_kind says, of the output's stage or the one before
  Shortcut shortcut_kind;
  void* out;
  int batch;
};

// `channels` are those of y; at stride 2 the output is of the next stage. `overlap` lets the
// kernel start while the one before still runs (sm_90): not for the first after the weights were
// written.
int conv3x3_forward(const ForwardParams& p, Dtype dtype, int channels, int stride, int blocks,
                    bool overlap, void* stream);

// `channels` are those of x.
int conv3x3_evaluate(const EvaluateParams& p, Dtype dtype, int channels, int stride, int blocks,
                     bool overlap, void* stream);

// `channels` are those of input. `blocks` is rounded up to whole slab rows.
int conv3x3_backward(const BackwardParams& p, Dtype dtype, int channels, int stride, int blocks,
                     bool overlap, void* stream);

// Rows of out_sums and slabs that conv3x3_backward writes with `blocks`: one a block, or one for
// two blocks with 64 channels at stride 1, but none for blocks that find no images.
int conv3x3_backward_rows(int channels, int stride, int blocks, int batch);

}  // namespace cifar_resnet_fast
