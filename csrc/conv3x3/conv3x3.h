// The 3x3 convolutions of the blocks, for code that knows nothing of CUDA; common/params.h has the
// vocabulary.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

// F1: x = relu(norm(y) + shortcut); out = conv(x).   F2, where x is null: out =
// conv(relu(norm(y))).
struct ForwardParams {
  const void* y;         // input of the normalisation, raw
  ForwardNorm norm;      // of y
  const void* shortcut;  // F1: as shortcut_kind says
  Shortcut shortcut_kind;
  void* x;             // F1: written, of the shape of y; F2: null
  const void* weight;  // forward fragments, see weights.h
  void* out;           // raw output
  float* out_sums;     // [blocks, 2, output channels] of out and out * out
  int images;
};

// dy = gradient of y = conv(input) through its batch normalisation, from dz.
// B2: out = conv_T(dy) where norm(input) > 0, else 0;       a = relu(norm(input))
// B1: out = conv_T(dy) + residual where input > 0, else 0;  a = input
// Both: slabs of dweight = sum over pixels of a times dy. At stride 2 the residual is option A's.
struct BackwardParams {
  const void* dz;
  const void* y;
  BackwardNorm norm;          // of y
  const void* input;          // B2: raw; B1: finished
  const void* residual;       // B1: dz of the block's output; B2: null
  const void* y_before;       // B1: raw input of the normalisation that made the input; B2: null
  const float* saved_before;  // [4, C] of that normalisation; B2: of the one of input
  const void* weight;         // backward fragments, see weights.h
  void* out;                  // dz of the normalisation that made the input
  float* out_sums;  // [slab rows, 2, C] of out and out * (y_before - mean); B2: y_before is input
  float* slabs;     // [slab rows, 9, C, K]
  SlabSum before;
  int images;
};

// Evaluation: out = relu(conv(x) + bias + shortcut), with the normalisation folded into weight and
// bias (weights.h). All activations are finished.
struct EvaluateParams {
  const void* x;
  const void* weight;    // forward fragments, folded
  const float* bias;     // [output channels]
  const void* shortcut;  // as shortcut_kind says, of the output's stage or the one before
  Shortcut shortcut_kind;
  void* out;
  int images;
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
int conv3x3_backward_rows(int channels, int stride, int blocks, int images);

}  // namespace cifar_resnet_fast
