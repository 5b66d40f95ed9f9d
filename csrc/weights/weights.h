// Weights in the order in which the convolution kernels keep them in registers.
//
// A fragment is 512 bytes: for each of 32 lanes the 8 weights that two mma.sync of a 16-channel
// step take from it. Lane (g, t) has, of the output channels o and o + 2, o = 16 h + 4 (g / 2) + g
// % 2, the input channels 16 s + 2t, + 1, + 8, + 9. With the channels dealt like that a lane's
// results are the four neighbouring channels 16 h + 4t .. 4t + 3.
#pragma once

#include "common/params.h"

namespace cifar_resnet_fast {

struct LayerWeights {
  const float* weight;  // of K by C by 3x3, the fp32 master
  void* forward;        // [K / 16][9 taps][C / 16][fragment]; for C = 3: [3 ky][fragment]
  void* backward;       // [C / 16][9 taps mirrored][K / 16][fragment], in and out swapped; or null
  // evaluation: folds this normalisation into forward and bias; null in training
  const float* bn_weight;     // [K]
  const float* bn_bias;       // [K]
  const float* running_mean;  // [K]
  const float* running_var;   // [K]
  float* bias;                // [K], written
  float eps;
  WeightLayout layout;
  int C;  // a multiple of 16, or 3: the stem, whose 16 "input channels" are
  int K;  // 4 pixels kx = 0 .. 3 times 4 channels, the last of both zero
};

// Once a step. `layers`: `count` of them in host memory, which travel as the launches' arguments,
// in training 128 a launch, in evaluation 51.
int prepare_weights(const LayerWeights* layers, int count, Dtype dtype, void* stream);

}  // namespace cifar_resnet_fast
