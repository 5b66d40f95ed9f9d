// The shapes that the convolutions are compiled for, and the choice among them at run time.
#pragma once

#include "common/params.h"
#include "common/warp.cuh"

namespace cifar_resnet_fast {

// Channels of the input; at stride 2 the output is of the next stage, with twice as many.
template <int CHANNELS, int STRIDE>
struct Shape {
  static constexpr int kChannels = CHANNELS, kStride = STRIDE;
};
template <class... S>
struct ShapeList {};
using Shapes = ShapeList<Shape<16, 1>, Shape<32, 1>, Shape<64, 1>, Shape<16, 2>, Shape<32, 2>>;

// use(shape) for the one of `Shapes` that has these channels and this stride; kNoKernel if
// there is none.
template <class Use, class... S>
int with_shape(int channels, int stride, Use use, ShapeList<S...>) {
  int status = kNoKernel;
  const auto tried = [&](auto shape) {
    if (channels != shape.kChannels || stride != shape.kStride) return false;
    status = use(shape);
    return true;
  };
  (tried(S()) || ...);
  return status;
}
template <class Use>
int with_shape(int channels, int stride, Use use) {
  return with_shape(channels, stride, use, Shapes());
}

// use(type) for the type of warp.cuh that a dtype names.
template <class Use>
int with_type(Dtype dtype, Use use) {
  return dtype == Dtype::kFloat16 ? use(Float16()) : use(BFloat16());
}

}  // namespace cifar_resnet_fast
