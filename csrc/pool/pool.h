// The end of the network's body: the last block's activation and the average over its 8x8 pixels.
// Statuses and dtypes as in params.h.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

// pooled = mean over pixels of x = relu(norm(y) + shortcut)
struct HeadForwardParams {
  const void* y;  // [N, 8, 8, 64], raw
  ForwardNorm norm;
  const void* shortcut;     // as shortcut_kind says, never none
  Shortcut shortcut_kind;   // option A where the last stage has one block
  unsigned char* positive;  // [N, 8, 8, 8]: bit k of a byte is x > 0 of channel 8 c + k
  float* pooled;            // [N, 64]
  int images;
};
int head_forward(const HeadForwardParams& p, Dtype dtype, int blocks, bool overlap, void* stream);

// dz = dpooled / 64 where x > 0, else 0
struct HeadBackwardParams {
  const float* dpooled;  // [N, 64]
  const unsigned char* positive;
  const void* y;
  const float* saved;  // [4, 64] of the normalisation of y
  void* dz;            // [N, 8, 8, 64]
  float* dz_sums;      // [blocks, 2, 64] of dz and dz * (y - mean)
  int images;
};
int head_backward(const HeadBackwardParams& p, Dtype dtype, int blocks, bool overlap,
                  void* stream);

}  // namespace cifar_resnet_fast
