// The backward kernels as operations on tensors.
#pragma once

#include <tuple>

#include "bindings/trunk_tensors.h"
#include "pool/pool.h"
#include "stem/stem.h"

namespace cifar_resnet_fast::trunk {

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Launch>
BatchNormBackward batch_norm_backward(const Launch& launch, const Tensor& y, const Tensor& sums,
                                      const Tensor& weight, const Tensor& norm,
                                      const Tensor& dweight, const Tensor& dbias) {
  const int64_t K = y.size(1);
  check_floats("sums", sums, {-1, 2, K}, y);
  check_floats("bn_weight", weight, {K}, y);
  check_floats("norm", norm, {4, K}, y);
  return {floats(launch, sums), static_cast<int>(sums.size(0)), floats(launch, weight),
          floats(launch, norm), new_floats(launch, dweight),    new_floats(launch, dbias)};
}

// Slabs [count, 9, C, K] and the gradient [K, C, 3, 3] that they add up to.
template <typename Launch>
SlabSum left_over(const Launch& launch, const OptionalTensor& slabs, const OptionalTensor& dweight,
                  const Tensor& like) {
  check(slabs.has_value() == dweight.has_value(),
        "left_slabs and left_dweight must be given together");
  if (!slabs.has_value()) return {};
  const WeightLayout layout = layout_of("left_dweight", *dweight);
  check_device("left_dweight", *dweight, like);
  const int64_t K = dweight->size(0), C_kept = dweight->size(1), C = C_kept == 3 ? 4 : C_kept;
  check_floats("left_slabs", *slabs, {-1, 9, C, K}, like);
  check(K % 4 == 0 && C % 4 == 0, "left_dweight must have multiples of 4 channels, got shape ",
        tuple_text(dweight->sizes()));
  return {floats(launch, *slabs),
          static_cast<int>(slabs->size(0)),
          static_cast<int>(C),
          static_cast<int>(K),
          static_cast<int>(C_kept),
          new_floats(launch, *dweight),
          layout};
}

// dz, dz_sums. Not overlapped with the kernel before: a hook on saved tensors may have it copy the
// fragments, which the next kernel reads before it waits.
template <typename Launch>
std::tuple<Tensor, Tensor> pool_backward(Tensor dpooled, Tensor mask, Tensor y, Tensor norm,
                                         int64_t blocks) {
  const Dtype dtype = dtype_of("y", y);
  const int grid = check_blocks(blocks);
  check_stage("y", y, 64, y);
  const int64_t N = y.size(0);
  check_floats("dpooled", dpooled, {N, 64}, y);
  check_floats("norm", norm, {4, 64}, y);
  check_device("mask", mask, y);
  check_dtype("mask", mask, ScalarType::Byte);
  check_shape("mask", mask, {N, 8, 8, 8});
  check(mask.is_contiguous(), "mask must be contiguous");
  const Tensor dz = empty_stage(y, 64), dz_sums = empty_floats({blocks, 2, 64}, y);
  const Launch launch("head_backward", y);
  PoolBackwardParams p = {};
  p.dpooled = floats(launch, dpooled);
  p.mask = static_cast<const unsigned char*>(launch.reads(mask));
  p.y = launch.reads(y);
  p.norm = floats(launch, norm);
  p.dz = launch.writes(dz);
  p.dz_sums = new_floats(launch, dz_sums);
  p.batch = batch_of(y);
  launch.check(::cifar_resnet_fast::pool_backward(p, dtype, grid, false, launch.stream()));
  return {dz, dz_sums};
}

template <typename Launch>
BackwardResult backward(const char* name, const Tensor& dz, const Tensor& y, const Tensor& sums,
                        const Tensor& bn_weight, const Tensor& norm, const Tensor& input,
                        const OptionalTensor& residual, const Tensor& y_before,
                        const Tensor& norm_before, const Tensor& fragments,
                        const OptionalTensor& left_slabs, const OptionalTensor& left_dweight,
                        int64_t stride, int64_t blocks) {
  check_stride(stride);
  const Dtype dtype = dtype_of("y", y);
  const int grid = check_blocks(blocks);
  const int64_t K = y.size(1), C = K / stride;
  check_stage("y", y, K, y);
  check_stage("dz", dz, K, y);
  check_stage("x", input, C, y);
  check_stage("y_before", y_before, C, y);
  check_floats("norm_before", norm_before, {4, C}, y);
  if (residual.has_value()) check_stage("residual", *residual, K, y);
  check_fragments(fragments, K * C * 9, y);
  const int64_t rows =
      conv3x3_backward_rows(static_cast<int>(C), static_cast<int>(stride), grid, batch_of(y));
  const Tensor out = empty_stage(y, C), out_sums = empty_floats({rows, 2, C}, y);
  const Tensor slabs = empty_floats({rows, 9, C, K}, y);
  const Tensor dbn_weight = empty_floats({K}, y), dbn_bias = empty_floats({K}, y);
  const Launch launch(name, y);
  BackwardParams p = {};
  p.dz = launch.reads(dz);
  p.y = launch.reads(y);
  p.bn = batch_norm_backward(launch, y, sums, bn_weight, norm, dbn_weight, dbn_bias);
  p.input = launch.reads(input);
  if (residual.has_value()) {
    p.residual = launch.reads(*residual);
    p.y_before = launch.reads(y_before);
  }
  p.norm_before = floats(launch, norm_before);
  p.fragments = launch.reads(fragments);
  p.out = launch.writes(out);
  p.out_sums = new_floats(launch, out_sums);
  p.slabs = new_floats(launch, slabs);
  p.before = left_over(launch, left_slabs, left_dweight, y);
  p.batch = batch_of(y);
  launch.check(conv3x3_backward(p, dtype, static_cast<int>(C), static_cast<int>(stride), grid,
                                true, launch.stream()));
  return {out, out_sums, slabs, dbn_weight, dbn_bias};
}

// out, out_sums, slabs, dbn_weight, dbn_bias
template <typename Launch>
BackwardResult backward_second(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor norm,
                               Tensor y_before, Tensor norm_before, Tensor fragments,
                               OptionalTensor left_slabs, OptionalTensor left_dweight,
                               int64_t blocks) {
  return backward<Launch>("conv3x3_b2", dz, y, sums, bn_weight, norm, y_before, std::nullopt,
                          y_before, norm_before, fragments, left_slabs, left_dweight, 1, blocks);
}

// the same
template <typename Launch>
BackwardResult backward_first(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor norm,
                              Tensor x, Tensor residual, Tensor y_before, Tensor norm_before,
                              Tensor fragments, OptionalTensor left_slabs,
                              OptionalTensor left_dweight, int64_t stride, int64_t blocks) {
  return backward<Launch>("conv3x3_b1", dz, y, sums, bn_weight, norm, x, residual, y_before,
                          norm_before, fragments, left_slabs, left_dweight, stride, blocks);
}

// slabs, dbn_weight, dbn_bias
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> stem_backward(Tensor dz, Tensor y, Tensor sums,
                                                 Tensor bn_weight, Tensor norm, Tensor images,
                                                 OptionalTensor left_slabs,
                                                 OptionalTensor left_dweight, int64_t blocks) {
  const Dtype dtype = dtype_of("y", y);
  const int grid = check_blocks(blocks);
  check_stage("y", y, 16, y);
  check_stage("dz", dz, 16, y);
  check_images(images);
  check_device("images", images, y);
  check_dtype("images", images, y.scalar_type());
  check_shape("images", images, {y.size(0), 4, 32, 32});
  const Tensor slabs = empty_floats({blocks, 9, 4, 16}, y);
  const Tensor dbn_weight = empty_floats({16}, y), dbn_bias = empty_floats({16}, y);
  const Launch launch("stem_backward", y);
  StemBackwardParams p = {};
  p.dz = launch.reads(dz);
  p.y = launch.reads(y);
  p.bn = batch_norm_backward(launch, y, sums, bn_weight, norm, dbn_weight, dbn_bias);
  p.images = launch.reads(images);
  p.slabs = new_floats(launch, slabs);
  p.before = left_over(launch, left_slabs, left_dweight, y);
  p.batch = batch_of(y);
  launch.check(::cifar_resnet_fast::stem_backward(p, dtype, grid, true, launch.stream()));
  return {slabs, dbn_weight, dbn_bias};
}

template <typename Launch>
void sum_slabs(Tensor slabs, Tensor dweight, int64_t blocks) {
  const Launch launch("sum_slabs", slabs);
  launch.check(::cifar_resnet_fast::sum_slabs(left_over(launch, slabs, dweight, slabs),
                                              check_blocks(blocks), true, launch.stream()));
}

}  // namespace cifar_resnet_fast::trunk
