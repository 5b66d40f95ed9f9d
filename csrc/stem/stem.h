// The first convolution, 3 to 16 channels, on images [N, 32, 32, 4], 16-bit, channels-last,
// whose fourth channel is ignored. Statuses and dtypes as in params.h.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

// y = conv(images); in evaluation, where bias is given, y = relu(conv(images) + bias)
struct StemForwardParams {
  const void* images;     // [N, 32, 32, 4]
  const void* fragments;  // of a [16, 3, 3, 3] weight, see weights.h
  const float* bias;      // [16], of the folded weight; null in training
  void* y;                // [N, 32, 32, 16]
  float* y_sums;          // [blocks, 2, 16] of y and y * y; not written in evaluation
  int batch;
};
int stem_forward(const StemForwardParams& p, Dtype dtype, int blocks, bool overlap, void* stream);

// dweight of y = conv(images) from dz; images need no gradient
struct StemBackwardParams {
  const void* dz;  // [N, 32, 32, 16]
  const void* y;   // [N, 32, 32, 16]
  BatchNormBackward bn;
  const void* images;  // [N, 32, 32, 4]
  float* slabs;        // [blocks, 9, 4, 16]; the fourth channel is padding
  SlabSum before;
  int batch;
};
int stem_backward(const StemBackwardParams& p, Dtype dtype, int blocks, bool overlap,
                  void* stream);

// What is left over when no backward kernel follows.
int sum_slabs(const SlabSum& slabs, int blocks, bool overlap, void* stream);

}  // namespace cifar_resnet_fast
