// The forward kernels, in training and in evaluation, as operations on tensors.
#pragma once

#include <tuple>

#include "bindings/trunk_tensors.h"
#include "pool/pool.h"
#include "stem/stem.h"

namespace cifar_resnet_fast::trunk {

inline Dtype check_raw(const Tensor& y, const Tensor& fragments, int64_t elements) {
  const Dtype dtype = dtype_of("y", y);
  check_stage("y", y, y.size(1), y);
  check_fragments(fragments, elements, y);
  return dtype;
}

template <typename Launch>
ForwardParams forward_params(const Launch& launch, const Tensor& y, const Tensor& fragments,
                             const Tensor& out, const Tensor& out_sums) {
  ForwardParams p = {};
  p.y = launch.reads(y);
  p.fragments = launch.reads(fragments);
  p.out = launch.writes(out);
  p.out_sums = new_floats(launch, out_sums);
  p.batch = batch_of(y);
  return p;
}

template <typename Launch>
BatchNormForward batch_norm_forward(const Launch& launch, const Tensor& y, const Tensor& sums,
                                    const Tensor& weight, const Tensor& bias,
                                    const Tensor& running_mean, const Tensor& running_var,
                                    double momentum, double eps, const Tensor& norm) {
  const int64_t C = y.size(1);
  check_floats("sums", sums, {-1, 2, C}, y);
  check_floats("bn_weight", weight, {C}, y);
  check_floats("bn_bias", bias, {C}, y);
  check_floats("running_mean", running_mean, {C}, y);
  check_floats("running_var", running_var, {C}, y);
  return {
      floats(launch, sums),     static_cast<int>(sums.size(0)),   floats(launch, weight),
      floats(launch, bias),     new_floats(launch, running_mean), new_floats(launch, running_var),
      new_floats(launch, norm), static_cast<float>(momentum),     static_cast<float>(eps)};
}

// y, sums. Not overlapped with the kernel before: that one makes the weights.
template <typename Launch>
std::tuple<Tensor, Tensor> stem_forward(Tensor images, Tensor fragments, int64_t blocks) {
  const Dtype dtype = dtype_of("images", images);
  const int grid = check_blocks(blocks);
  check_images(images);
  check_fragments(fragments, kStemFragments, images);
  const Tensor y = empty_stage(images, 16), sums = empty_floats({blocks, 2, 16}, images);
  const Launch launch("stem_forward", images);
  StemForwardParams p = {};
  p.images = launch.reads(images);
  p.fragments = launch.reads(fragments);
  p.y = launch.writes(y);
  p.y_sums = new_floats(launch, sums);
  p.batch = batch_of(images);
  launch.check(::cifar_resnet_fast::stem_forward(p, dtype, grid, false, launch.stream()));
  return {y, sums};
}

template <typename Launch>
Tensor stem_evaluate(Tensor images, Tensor fragments, Tensor bias, int64_t blocks) {
  const Dtype dtype = dtype_of("images", images);
  const int grid = check_blocks(blocks);
  check_images(images);
  check_fragments(fragments, kStemFragments, images);
  check_floats("bias", bias, {16}, images);
  const Tensor x = empty_stage(images, 16);
  const Launch launch("stem_evaluate", images);
  StemForwardParams p = {};
  p.images = launch.reads(images);
  p.fragments = launch.reads(fragments);
  p.bias = floats(launch, bias);
  p.y = launch.writes(x);
  p.batch = batch_of(images);
  launch.check(::cifar_resnet_fast::stem_forward(p, dtype, grid, false, launch.stream()));
  return x;
}

// x, out, out_sums, norm
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_first(Tensor y, Tensor sums, Tensor bn_weight,
                                                         Tensor bn_bias, Tensor running_mean,
                                                         Tensor running_var, double momentum,
                                                         double eps, OptionalTensor shortcut,
                                                         Tensor fragments, int64_t stride,
                                                         int64_t blocks) {
  check_stride(stride);
  const int64_t C = y.size(1), K = C * stride;
  const Dtype dtype = check_raw(y, fragments, C * K * 9);
  const int grid = check_blocks(blocks);
  const Tensor x = empty_stage(y, C), out = empty_stage(y, K);
  const Tensor out_sums = empty_floats({blocks, 2, K}, y), norm = empty_floats({4, C}, y);
  const Launch launch("conv3x3_f1", y);
  ForwardParams p = forward_params(launch, y, fragments, out, out_sums);
  p.bn = batch_norm_forward(launch, y, sums, bn_weight, bn_bias, running_mean, running_var,
                            momentum, eps, norm);
  p.shortcut_kind = Shortcut::kNone;
  if (shortcut.has_value()) p.shortcut_kind = shortcut_of(launch, *shortcut, y, p.shortcut);
  p.x = launch.writes(x);
  launch.check(conv3x3_forward(p, dtype, static_cast<int>(C), static_cast<int>(stride), grid, true,
                               launch.stream()));
  return {x, out, out_sums, norm};
}

// out, out_sums, norm
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> forward_second(Tensor y, Tensor sums, Tensor bn_weight,
                                                  Tensor bn_bias, Tensor running_mean,
                                                  Tensor running_var, double momentum, double eps,
                                                  Tensor fragments, int64_t blocks) {
  const int64_t C = y.size(1);
  const Dtype dtype = check_raw(y, fragments, C * C * 9);
  const int grid = check_blocks(blocks);
  const Tensor out = empty_stage(y, C);
  const Tensor out_sums = empty_floats({blocks, 2, C}, y), norm = empty_floats({4, C}, y);
  const Launch launch("conv3x3_f2", y);
  ForwardParams p = forward_params(launch, y, fragments, out, out_sums);
  p.bn = batch_norm_forward(launch, y, sums, bn_weight, bn_bias, running_mean, running_var,
                            momentum, eps, norm);
  p.shortcut_kind = Shortcut::kNone;
  launch.check(conv3x3_forward(p, dtype, static_cast<int>(C), 1, grid, true, launch.stream()));
  return {out, out_sums, norm};
}

template <typename Launch>
Tensor conv3x3_evaluate(Tensor x, Tensor fragments, Tensor bias, OptionalTensor shortcut,
                        int64_t stride, int64_t blocks) {
  check_stride(stride);
  const int64_t C = x.size(1), K = C * stride;
  const Dtype dtype = dtype_of("x", x);
  const int grid = check_blocks(blocks);
  check_stage("x", x, C, x);
  check_fragments(fragments, C * K * 9, x);
  check_floats("bias", bias, {K}, x);
  const Tensor out = empty_stage(x, K);
  const Launch launch("conv3x3_evaluate", x);
  EvaluateParams p = {};
  p.x = launch.reads(x);
  p.fragments = launch.reads(fragments);
  p.bias = floats(launch, bias);
  p.shortcut_kind = Shortcut::kNone;
  if (shortcut.has_value()) p.shortcut_kind = shortcut_of(launch, *shortcut, out, p.shortcut);
  p.out = launch.writes(out);
  p.batch = batch_of(x);
  launch.check(::cifar_resnet_fast::conv3x3_evaluate(
      p, dtype, static_cast<int>(C), static_cast<int>(stride), grid, true, launch.stream()));
  return out;
}

// pooled, mask, norm
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> pool_forward(Tensor y, Tensor sums, Tensor bn_weight,
                                                Tensor bn_bias, Tensor running_mean,
                                                Tensor running_var, double momentum, double eps,
                                                Tensor shortcut, int64_t blocks) {
  const Dtype dtype = dtype_of("y", y);
  const int grid = check_blocks(blocks);
  check_stage("y", y, 64, y);
  const int64_t N = y.size(0);
  const Tensor pooled = empty_floats({N, 64}, y), norm = empty_floats({4, 64}, y);
  const Tensor mask =
      torch::stable::empty({N, 8, 8, 8}, ScalarType::Byte, std::nullopt, y.device());
  const Launch launch("head_forward", y);
  PoolForwardParams p = {};
  p.y = launch.reads(y);
  p.bn = batch_norm_forward(launch, y, sums, bn_weight, bn_bias, running_mean, running_var,
                            momentum, eps, norm);
  p.shortcut_kind = shortcut_of(launch, shortcut, y, p.shortcut);
  p.mask = static_cast<unsigned char*>(launch.writes(mask));
  p.pooled = new_floats(launch, pooled);
  p.batch = batch_of(y);
  launch.check(::cifar_resnet_fast::pool_forward(p, dtype, grid, true, launch.stream()));
  return {pooled, mask, norm};
}

}  // namespace cifar_resnet_fast::trunk
