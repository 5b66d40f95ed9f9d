// The end of the network's body: the last block's activation and the average over its 8x8 pixels.
// Statuses and dtypes as in params.h.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

// pooled = mean over pixels of x = relu(norm(y) + shortcut)
struct PoolForwardParams {
  const void* y;  // [N, 8, 8, 64], raw
  BatchNormForward bn;
  const void* shortcut;    // as shortcut_kind says, never none
  Shortcut shortcut_kind;  // option A where the last stage has one block
  unsigned char* mask;     // [N, 8, 8, 8]: bit k of a byte is x > 0 of channel 8 c + k
  float* pooled;           // [N, 64]
  int batch;
};
int pool_forward(const PoolForwardParams& p, Dtype dtype, int blocks, bool overlap, void* stream);

// dz = dpooled / 64 where x > 0, else 0
struct PoolBackwardParams {
  const float* dpooled;  // [N, 64]
  const unsigned char* mask;
  const void* y;
  const float* norm;  // [4, 64] of the normalisation of y
  void* dz;           // [N, 8, 8, 64]
  float* dz_sums;     // [blocks, 2, 64] of dz and dz * (y - mean)
  int batch;
};
int pool_backward(const PoolBackwardParams& p, Dtype dtype, int blocks, bool overlap,
                  void* stream);

}  // namespace cifar_resnet_fast
