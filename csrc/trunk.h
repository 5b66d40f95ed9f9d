// The kernels of the network's trunk as torch calls them: check, allocate, fill the params,
// launch. cifar_resnet_fast/ops/trunk_cuda.py calls them in order, the convolutions right behind
// each other: a convolution may start before the kernel before it has ended, and only
// stem_forward and stem_evaluate wait for whoever made the fragments.
// kernels/{conv3x3,stem,head,weights}.h say what each computes.
//
// `Launch` is made from the operation's name and a tensor, and while it lives kernels run on that
// tensor's device: `stream()` is where, `reads` and `writes` give a tensor's memory, `check` takes
// a kernel's status. cuda.cpp has the real one; tests/emulation one that runs them on a CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels/conv3x3.h"
#include "kernels/head.h"
#include "kernels/stem.h"
#include "kernels/weights.h"
#include "operations.h"

namespace cifar_resnet_fast {

using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStemFragments = 3 * 256;  // elements

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
        " must be torch.float16 or torch.bfloat16, got ", dtype_text(dtype));
  return dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// Images are [N, C, S, S] with S = 512 / C.
inline int64_t side_of(int64_t channels) {
  check(channels == 16 || channels == 32 || channels == 64, "channels must be 16, 32 or 64, got ",
        channels);
  return 512 / channels;
}

inline void check_aligned(const char* name, const Tensor& tensor, uintptr_t bytes) {
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0, name,
        " must be aligned to ", bytes, " bytes");
}

// `tensor` is an activation of `channels` with the batch, dtype and device of `like`.
inline void check_stage(const char* name, const Tensor& tensor, int64_t channels,
                        const Tensor& like) {
  check_tensor(name, tensor, {"N", "C", "S", "S"});
  check_device(name, tensor, like);
  check_dtype(name, tensor, like.scalar_type());
  const int64_t side = side_of(channels);
  check_shape(name, tensor, {like.size(0), channels, side, side});
  check_channels_last(name, tensor);
  check_aligned(name, tensor, 16);
}

// `tensor` is float32, contiguous, of the shape given, where x lives; a size of -1 is free. What
// has more than one axis is aligned, too.
inline void check_floats(const char* name, const Tensor& tensor, std::vector<int64_t> shape,
                         const Tensor& x) {
  check_dtype(name, tensor, ScalarType::Float);
  check_device(name, tensor, x);
  for (size_t i = 0; i < shape.size() && i < static_cast<size_t>(tensor.dim()); ++i) {
    if (shape[i] < 0) shape[i] = tensor.size(static_cast<int64_t>(i));
  }
  check_shape(name, tensor, shape);
  check(tensor.numel() > 0 && tensor.is_contiguous(), name,
        " must be contiguous and not empty, got strides ", tuple_text(tensor.strides()));
  if (tensor.dim() > 1) check_aligned(name, tensor, 16);
}

inline void check_fragments(const Tensor& fragments, int64_t elements, const Tensor& x) {
  check_device("fragments", fragments, x);
  check_dtype("fragments", fragments, x.scalar_type());
  check_shape("fragments", fragments, {elements});
  check(fragments.is_contiguous(), "fragments must be contiguous");
  check_aligned("fragments", fragments, 16);
}

inline void check_pictures(const Tensor& pictures) {
  check_tensor("pictures", pictures, {"N", "C", "H", "W"});
  check_shape("pictures", pictures, {pictures.size(0), 4, 32, 32});
  check_channels_last("pictures", pictures);
  check_aligned("pictures", pictures, 8);
}

inline int check_blocks(int64_t blocks) {
  check(blocks >= 1 && blocks <= 65535, "blocks must be in 1 .. 65535, got ", blocks);
  return static_cast<int>(blocks);
}

inline int images_of(const Tensor& tensor) {
  check(tensor.size(0) <= 65535, "images must be 1 .. 65535, got ", tensor.size(0));
  return static_cast<int>(tensor.size(0));
}

// Of a weight or its gradient [K, C, 3, 3].
inline WeightLayout layout_of(const char* name, const Tensor& weight) {
  check_tensor(name, weight, {"K", "C", "3", "3"});
  check_dtype(name, weight, ScalarType::Float);
  check_shape(name, weight, {weight.size(0), weight.size(1), 3, 3});
  if (weight.is_contiguous()) return WeightLayout::kContiguous;
  check_channels_last(name, weight);
  return WeightLayout::kChannelsLast;
}

inline Tensor empty_stage(const Tensor& like, int64_t channels) {
  const int64_t side = side_of(channels);
  return empty_channels_last({like.size(0), channels, side, side}, like);
}
inline Tensor empty_floats(const std::vector<int64_t>& shape, const Tensor& like) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, like.device());
}

template <typename Launch>
struct Trunk {
  // elements of the fragments of a weight, in one direction
  static int64_t fragment_elements(const Tensor& weight) {
    return weight.size(1) == 3 ? kStemFragments : weight.numel();
  }

  // `layers` with what training and evaluation have in common; forward fragments from `first` on,
  // each followed by the backward ones where `both`
  static std::vector<LayerWeights> layers_of(const Launch& launch, const Tensors& weights,
                                             const Tensor& fragments, bool both) {
    std::vector<LayerWeights> layers;
    auto* next = static_cast<uint16_t*>(launch.writes(fragments));
    for (const Tensor& weight : weights) {
      LayerWeights layer = {};
      layer.weight = static_cast<const float*>(launch.reads(weight));
      layer.layout = layout_of("weight", weight);
      layer.K = static_cast<int>(weight.size(0));
      layer.C = static_cast<int>(weight.size(1));
      const int64_t elements = fragment_elements(weight);
      layer.forward = next;
      next += elements;
      if (both && layer.C != 3) {
        layer.backward = next;
        next += elements;
      }
      layers.push_back(layer);
    }
    return layers;
  }

  static Tensor empty_fragments(const Tensors& weights, const Tensor& like, bool both) {
    check(!weights.empty(), "weights must not be empty");
    int64_t elements = 0;
    for (const Tensor& weight : weights) {
      layout_of("weight", weight);
      check_device("weight", weight, like);
      const int64_t K = weight.size(0), C = weight.size(1);
      check(K % 16 == 0 && K <= 256 && (C == 3 ? K == 16 : C % 16 == 0),
            "weight must have multiples of 16 channels, or 3 and 16, got shape ",
            tuple_text(weight.sizes()));
      elements += fragment_elements(weight) * (both && C != 3 ? 2 : 1);
    }
    return torch::stable::empty({elements}, like.scalar_type(), std::nullopt, like.device());
  }

  // [elements] of like's dtype: forward and backward fragments, layer after layer; the stem has
  // only the first
  static Tensor prepare_weights(Tensors weights, Tensor like) {
    const Dtype dtype = dtype_of("like", like);
    const Tensor fragments = empty_fragments(weights, like, true);
    const Launch launch("prepare_weights", like);
    const auto layers = layers_of(launch, weights, fragments, true);
    launch.check(::cifar_resnet_fast::prepare_weights(
        layers.data(), static_cast<int>(layers.size()), dtype, launch.stream()));
    return fragments;
  }

  // fragments: forward ones, layer after layer; biases: [sum of K] float32
  static std::tuple<Tensor, Tensor> fold_weights(Tensors weights, Tensors bn_weights,
                                                 Tensors bn_biases, Tensors running_means,
                                                 Tensors running_vars, std::vector<double> eps,
                                                 Tensor like) {
    const Dtype dtype = dtype_of("like", like);
    const Tensor fragments = empty_fragments(weights, like, false);
    const size_t count = weights.size();
    check(bn_weights.size() == count && bn_biases.size() == count &&
              running_means.size() == count && running_vars.size() == count && eps.size() == count,
          "there must be one normalisation a weight, ", count);
    int64_t channels = 0;
    for (size_t i = 0; i < count; ++i) {
      const std::vector<int64_t> shape = {weights[i].size(0)};
      check_floats("bn_weight", bn_weights[i], shape, like);
      check_floats("bn_bias", bn_biases[i], shape, like);
      check_floats("running_mean", running_means[i], shape, like);
      check_floats("running_var", running_vars[i], shape, like);
      channels += shape[0];
    }
    const Tensor biases = empty_floats({channels}, like);
    const Launch launch("fold_weights", like);
    auto layers = layers_of(launch, weights, fragments, false);
    auto* bias = static_cast<float*>(launch.writes(biases));
    for (size_t i = 0; i < count; ++i) {
      layers[i].bn_weight = floats(launch, bn_weights[i]);
      layers[i].bn_bias = floats(launch, bn_biases[i]);
      layers[i].running_mean = floats(launch, running_means[i]);
      layers[i].running_var = floats(launch, running_vars[i]);
      layers[i].eps = static_cast<float>(eps[i]);
      layers[i].bias = bias;
      bias += layers[i].K;
    }
    launch.check(::cifar_resnet_fast::prepare_weights(layers.data(), static_cast<int>(count),
                                                      dtype, launch.stream()));
    return {fragments, biases};
  }

  // y, sums. Not overlapped with the kernel before: that one makes the weights.
  static std::tuple<Tensor, Tensor> stem_forward(Tensor pictures, Tensor fragments,
                                                 int64_t blocks) {
    const Dtype dtype = dtype_of("pictures", pictures);
    check_pictures(pictures);
    check_fragments(fragments, kStemFragments, pictures);
    const Tensor y = empty_stage(pictures, 16), sums = empty_floats({blocks, 2, 16}, pictures);
    const Launch launch("stem_forward", pictures);
    StemForwardParams p = {};
    p.pictures = launch.reads(pictures);
    p.weight = launch.reads(fragments);
    p.y = launch.writes(y);
    p.y_sums = new_floats(launch, sums);
    p.images = images_of(pictures);
    launch.check(
        ::cifar_resnet_fast::stem_forward(p, dtype, check_blocks(blocks), false, launch.stream()));
    return {y, sums};
  }

  static Tensor stem_evaluate(Tensor pictures, Tensor fragments, Tensor bias, int64_t blocks) {
    const Dtype dtype = dtype_of("pictures", pictures);
    check_pictures(pictures);
    check_fragments(fragments, kStemFragments, pictures);
    check_floats("bias", bias, {16}, pictures);
    const Tensor x = empty_stage(pictures, 16);
    const Launch launch("stem_evaluate", pictures);
    StemForwardParams p = {};
    p.pictures = launch.reads(pictures);
    p.weight = launch.reads(fragments);
    p.bias = floats(launch, bias);
    p.y = launch.writes(x);
    p.images = images_of(pictures);
    launch.check(
        ::cifar_resnet_fast::stem_forward(p, dtype, check_blocks(blocks), false, launch.stream()));
    return x;
  }

  // x, out, out_sums, saved
  static std::tuple<Tensor, Tensor, Tensor, Tensor> conv3x3_f1(
      Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias, Tensor running_mean,
      Tensor running_var, double momentum, double eps, OptionalTensor shortcut, Tensor fragments,
      int64_t stride, int64_t blocks) {
    check_stride(stride);
    const int64_t C = y.size(1), K = C * stride;
    const Dtype dtype = check_raw(y, fragments, C * K * 9);
    const Tensor x = empty_stage(y, C), out = empty_stage(y, K);
    const Tensor out_sums = empty_floats({blocks, 2, K}, y), saved = empty_floats({4, C}, y);
    const Launch launch("conv3x3_f1", y);
    ForwardParams p = forward_params(launch, y, fragments, out, out_sums);
    p.norm = forward_norm(launch, y, sums, bn_weight, bn_bias, running_mean, running_var, momentum,
                          eps, saved);
    p.shortcut_kind = Shortcut::kNone;
    if (shortcut.has_value()) p.shortcut_kind = shortcut_of(launch, *shortcut, y, p.shortcut);
    p.x = launch.writes(x);
    launch.check(conv3x3_forward(p, dtype, static_cast<int>(C), static_cast<int>(stride),
                                 check_blocks(blocks), true, launch.stream()));
    return {x, out, out_sums, saved};
  }

  // out, out_sums, saved
  static std::tuple<Tensor, Tensor, Tensor> conv3x3_f2(Tensor y, Tensor sums, Tensor bn_weight,
                                                       Tensor bn_bias, Tensor running_mean,
                                                       Tensor running_var, double momentum,
                                                       double eps, Tensor fragments,
                                                       int64_t blocks) {
    const int64_t C = y.size(1);
    const Dtype dtype = check_raw(y, fragments, C * C * 9);
    const Tensor out = empty_stage(y, C);
    const Tensor out_sums = empty_floats({blocks, 2, C}, y), saved = empty_floats({4, C}, y);
    const Launch launch("conv3x3_f2", y);
    ForwardParams p = forward_params(launch, y, fragments, out, out_sums);
    p.norm = forward_norm(launch, y, sums, bn_weight, bn_bias, running_mean, running_var, momentum,
                          eps, saved);
    p.shortcut_kind = Shortcut::kNone;
    launch.check(conv3x3_forward(p, dtype, static_cast<int>(C), 1, check_blocks(blocks), true,
                                 launch.stream()));
    return {out, out_sums, saved};
  }

  static Tensor conv3x3_evaluate(Tensor x, Tensor fragments, Tensor bias, OptionalTensor shortcut,
                                 int64_t stride, int64_t blocks) {
    check_stride(stride);
    const int64_t C = x.size(1), K = C * stride;
    const Dtype dtype = dtype_of("x", x);
    check_stage("x", x, C, x);
    check_fragments(fragments, C * K * 9, x);
    check_floats("bias", bias, {K}, x);
    const Tensor out = empty_stage(x, K);
    const Launch launch("conv3x3_evaluate", x);
    EvaluateParams p = {};
    p.x = launch.reads(x);
    p.weight = launch.reads(fragments);
    p.bias = floats(launch, bias);
    p.shortcut_kind = Shortcut::kNone;
    if (shortcut.has_value()) p.shortcut_kind = shortcut_of(launch, *shortcut, out, p.shortcut);
    p.out = launch.writes(out);
    p.images = images_of(x);
    launch.check(::cifar_resnet_fast::conv3x3_evaluate(
        p, dtype, static_cast<int>(C), static_cast<int>(stride), check_blocks(blocks), true,
        launch.stream()));
    return out;
  }

  // pooled, positive, saved
  static std::tuple<Tensor, Tensor, Tensor> head_forward(Tensor y, Tensor sums, Tensor bn_weight,
                                                         Tensor bn_bias, Tensor running_mean,
                                                         Tensor running_var, double momentum,
                                                         double eps, Tensor shortcut,
                                                         int64_t blocks) {
    const Dtype dtype = dtype_of("y", y);
    check_stage("y", y, 64, y);
    const int64_t N = y.size(0);
    const Tensor pooled = empty_floats({N, 64}, y), saved = empty_floats({4, 64}, y);
    const Tensor positive =
        torch::stable::empty({N, 8, 8, 8}, ScalarType::Byte, std::nullopt, y.device());
    const Launch launch("head_forward", y);
    HeadForwardParams p = {};
    p.y = launch.reads(y);
    p.norm = forward_norm(launch, y, sums, bn_weight, bn_bias, running_mean, running_var, momentum,
                          eps, saved);
    p.shortcut_kind = shortcut_of(launch, shortcut, y, p.shortcut);
    p.positive = static_cast<unsigned char*>(launch.writes(positive));
    p.pooled = new_floats(launch, pooled);
    p.images = images_of(y);
    launch.check(
        ::cifar_resnet_fast::head_forward(p, dtype, check_blocks(blocks), true, launch.stream()));
    return {pooled, positive, saved};
  }

  // dz, dz_sums
  static std::tuple<Tensor, Tensor> head_backward(Tensor dpooled, Tensor positive, Tensor y,
                                                  Tensor saved, int64_t blocks) {
    const Dtype dtype = dtype_of("y", y);
    check_stage("y", y, 64, y);
    const int64_t N = y.size(0);
    check_floats("dpooled", dpooled, {N, 64}, y);
    check_floats("saved", saved, {4, 64}, y);
    check_device("positive", positive, y);
    check_dtype("positive", positive, ScalarType::Byte);
    check_shape("positive", positive, {N, 8, 8, 8});
    check(positive.is_contiguous(), "positive must be contiguous");
    const Tensor dz = empty_stage(y, 64), dz_sums = empty_floats({blocks, 2, 64}, y);
    const Launch launch("head_backward", y);
    HeadBackwardParams p = {};
    p.dpooled = floats(launch, dpooled);
    p.positive = static_cast<const unsigned char*>(launch.reads(positive));
    p.y = launch.reads(y);
    p.saved = floats(launch, saved);
    p.dz = launch.writes(dz);
    p.dz_sums = new_floats(launch, dz_sums);
    p.images = images_of(y);
    launch.check(
        ::cifar_resnet_fast::head_backward(p, dtype, check_blocks(blocks), true, launch.stream()));
    return {dz, dz_sums};
  }

  using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  // out, out_sums, slabs, dbn_weight, dbn_bias
  static BackwardResult conv3x3_b2(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight,
                                   Tensor saved, Tensor raw, Tensor raw_saved, Tensor fragments,
                                   OptionalTensor left_slabs, OptionalTensor left_dweight,
                                   int64_t blocks) {
    return backward("conv3x3_b2", dz, y, sums, bn_weight, saved, raw, std::nullopt, raw, raw_saved,
                    fragments, left_slabs, left_dweight, 1, blocks);
  }

  // the same
  static BackwardResult conv3x3_b1(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight,
                                   Tensor saved, Tensor x, Tensor residual, Tensor raw,
                                   Tensor raw_saved, Tensor fragments, OptionalTensor left_slabs,
                                   OptionalTensor left_dweight, int64_t stride, int64_t blocks) {
    return backward("conv3x3_b1", dz, y, sums, bn_weight, saved, x, residual, raw, raw_saved,
                    fragments, left_slabs, left_dweight, stride, blocks);
  }

  // slabs, dbn_weight, dbn_bias
  static std::tuple<Tensor, Tensor, Tensor> stem_backward(
      Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor saved, Tensor pictures,
      OptionalTensor left_slabs, OptionalTensor left_dweight, int64_t blocks) {
    const Dtype dtype = dtype_of("y", y);
    check_stage("y", y, 16, y);
    check_stage("dz", dz, 16, y);
    check_pictures(pictures);
    check_device("pictures", pictures, y);
    check_dtype("pictures", pictures, y.scalar_type());
    check_shape("pictures", pictures, {y.size(0), 4, 32, 32});
    const Tensor slabs = empty_floats({blocks, 9, 4, 16}, y);
    const Tensor dbn_weight = empty_floats({16}, y), dbn_bias = empty_floats({16}, y);
    const Launch launch("stem_backward", y);
    StemBackwardParams p = {};
    p.dz = launch.reads(dz);
    p.y = launch.reads(y);
    p.norm = backward_norm(launch, y, sums, bn_weight, saved, dbn_weight, dbn_bias);
    p.pictures = launch.reads(pictures);
    p.slabs = new_floats(launch, slabs);
    p.before = left_over(launch, left_slabs, left_dweight, y);
    p.images = images_of(y);
    launch.check(
        ::cifar_resnet_fast::stem_backward(p, dtype, check_blocks(blocks), true, launch.stream()));
    return {slabs, dbn_weight, dbn_bias};
  }

  static void sum_slabs(Tensor slabs, Tensor dweight, int64_t blocks) {
    const Launch launch("sum_slabs", slabs);
    launch.check(::cifar_resnet_fast::sum_slabs(left_over(launch, slabs, dweight, slabs),
                                                check_blocks(blocks), true, launch.stream()));
  }

 private:
  static const float* floats(const Launch& launch, const Tensor& tensor) {
    return static_cast<const float*>(launch.reads(tensor));
  }
  static float* new_floats(const Launch& launch, const Tensor& tensor) {
    return static_cast<float*>(launch.writes(tensor));
  }

  static Dtype check_raw(const Tensor& y, const Tensor& fragments, int64_t elements) {
    const Dtype dtype = dtype_of("y", y);
    check_stage("y", y, y.size(1), y);
    check_fragments(fragments, elements, y);
    return dtype;
  }

  static ForwardParams forward_params(const Launch& launch, const Tensor& y,
                                      const Tensor& fragments, const Tensor& out,
                                      const Tensor& out_sums) {
    ForwardParams p = {};
    p.y = launch.reads(y);
    p.weight = launch.reads(fragments);
    p.out = launch.writes(out);
    p.out_sums = new_floats(launch, out_sums);
    p.images = images_of(y);
    return p;
  }

  static ForwardNorm forward_norm(const Launch& launch, const Tensor& y, const Tensor& sums,
                                  const Tensor& weight, const Tensor& bias,
                                  const Tensor& running_mean, const Tensor& running_var,
                                  double momentum, double eps, const Tensor& saved) {
    const int64_t C = y.size(1);
    check_floats("sums", sums, {-1, 2, C}, y);
    check_floats("bn_weight", weight, {C}, y);
    check_floats("bn_bias", bias, {C}, y);
    check_floats("running_mean", running_mean, {C}, y);
    check_floats("running_var", running_var, {C}, y);
    return {floats(launch, sums),
            static_cast<int>(sums.size(0)),
            floats(launch, weight),
            floats(launch, bias),
            new_floats(launch, running_mean),
            new_floats(launch, running_var),
            new_floats(launch, saved),
            static_cast<float>(momentum),
            static_cast<float>(eps)};
  }

  static BackwardNorm backward_norm(const Launch& launch, const Tensor& y, const Tensor& sums,
                                    const Tensor& weight, const Tensor& saved,
                                    const Tensor& dweight, const Tensor& dbias) {
    const int64_t K = y.size(1);
    check_floats("sums", sums, {-1, 2, K}, y);
    check_floats("bn_weight", weight, {K}, y);
    check_floats("saved", saved, {4, K}, y);
    return {floats(launch, sums),  static_cast<int>(sums.size(0)), floats(launch, weight),
            floats(launch, saved), new_floats(launch, dweight),    new_floats(launch, dbias)};
  }

  // What is added to an activation of y's shape: of that shape, or of the stage before.
  static Shortcut shortcut_of(const Launch& launch, const Tensor& shortcut, const Tensor& y,
                              const void*& memory) {
    const bool option_a = shortcut.dim() == 4 && shortcut.size(1) * 2 == y.size(1);
    check_stage("shortcut", shortcut, option_a ? y.size(1) / 2 : y.size(1), y);
    memory = launch.reads(shortcut);
    return option_a ? Shortcut::kOptionA : Shortcut::kIdentity;
  }

  // Slabs [count, 9, C, K] and the gradient [K, C, 3, 3] that they add up to.
  static SlabSum left_over(const Launch& launch, const OptionalTensor& slabs,
                           const OptionalTensor& dweight, const Tensor& like) {
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

  static BackwardResult backward(const char* name, const Tensor& dz, const Tensor& y,
                                 const Tensor& sums, const Tensor& bn_weight, const Tensor& saved,
                                 const Tensor& input, const OptionalTensor& residual,
                                 const Tensor& raw, const Tensor& raw_saved,
                                 const Tensor& fragments, const OptionalTensor& left_slabs,
                                 const OptionalTensor& left_dweight, int64_t stride,
                                 int64_t blocks) {
    check_stride(stride);
    const Dtype dtype = dtype_of("y", y);
    const int64_t K = y.size(1), C = K / stride;
    check_stage("y", y, K, y);
    check_stage("dz", dz, K, y);
    check_stage("x", input, C, y);
    check_stage("raw", raw, C, y);
    check_floats("raw_saved", raw_saved, {4, C}, y);
    if (residual.has_value()) check_stage("residual", *residual, K, y);
    check_fragments(fragments, K * C * 9, y);
    const int grid = check_blocks(blocks);
    const int64_t rows =
        conv3x3_backward_rows(static_cast<int>(C), static_cast<int>(stride), grid);
    const Tensor out = empty_stage(y, C), out_sums = empty_floats({rows, 2, C}, y);
    const Tensor slabs = empty_floats({rows, 9, C, K}, y);
    const Tensor dbn_weight = empty_floats({K}, y), dbn_bias = empty_floats({K}, y);
    const Launch launch(name, y);
    BackwardParams p = {};
    p.dz = launch.reads(dz);
    p.y = launch.reads(y);
    p.norm = backward_norm(launch, y, sums, bn_weight, saved, dbn_weight, dbn_bias);
    p.input = launch.reads(input);
    if (residual.has_value()) {
      p.residual = launch.reads(*residual);
      p.y_before = launch.reads(raw);
    }
    p.saved_before = floats(launch, raw_saved);
    p.weight = launch.reads(fragments);
    p.out = launch.writes(out);
    p.out_sums = new_floats(launch, out_sums);
    p.slabs = new_floats(launch, slabs);
    p.before = left_over(launch, left_slabs, left_dweight, y);
    p.images = images_of(y);
    launch.check(conv3x3_backward(p, dtype, static_cast<int>(C), static_cast<int>(stride), grid,
                                  true, launch.stream()));
    return {out, out_sums, slabs, dbn_weight, dbn_bias};
  }
};

// Their names and signatures; cpu.cpp makes them known to torch.
inline void define_trunk(torch::stable::detail::StableLibrary& m) {
  m.def("prepare_weights(Tensor[] weights, Tensor like) -> Tensor");
  m.def(
      "fold_weights(Tensor[] weights, Tensor[] bn_weights, Tensor[] bn_biases,"
      " Tensor[] running_means, Tensor[] running_vars, float[] eps, Tensor like)"
      " -> (Tensor fragments, Tensor biases)");
  m.def("stem_forward(Tensor pictures, Tensor fragments, int blocks) -> (Tensor y, Tensor sums)");
  m.def("stem_evaluate(Tensor pictures, Tensor fragments, Tensor bias, int blocks) -> Tensor x");
  m.def(
      "conv3x3_f1(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor? shortcut, Tensor fragments, int stride, int blocks)"
      " -> (Tensor x, Tensor out, Tensor out_sums, Tensor saved)");
  m.def(
      "conv3x3_f2(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor fragments, int blocks) -> (Tensor out, Tensor out_sums, Tensor saved)");
  m.def(
      "conv3x3_evaluate(Tensor x, Tensor fragments, Tensor bias, Tensor? shortcut, int stride,"
      " int blocks) -> Tensor out");
  m.def(
      "head_forward(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor shortcut, int blocks) -> (Tensor pooled, Tensor positive, Tensor saved)");
  m.def(
      "head_backward(Tensor dpooled, Tensor positive, Tensor y, Tensor saved, int blocks)"
      " -> (Tensor dz, Tensor dz_sums)");
  m.def(
      "conv3x3_b2(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor saved, Tensor raw,"
      " Tensor raw_saved, Tensor fragments, Tensor? left_slabs, Tensor(a!)? left_dweight,"
      " int blocks)"
      " -> (Tensor out, Tensor out_sums, Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def(
      "conv3x3_b1(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor saved, Tensor x,"
      " Tensor residual, Tensor raw, Tensor raw_saved, Tensor fragments, Tensor? left_slabs,"
      " Tensor(a!)? left_dweight, int stride, int blocks)"
      " -> (Tensor out, Tensor out_sums, Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def(
      "stem_backward(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor saved,"
      " Tensor pictures, Tensor? left_slabs, Tensor(a!)? left_dweight, int blocks)"
      " -> (Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def("sum_slabs(Tensor slabs, Tensor(a!) dweight, int blocks) -> ()");
}

template <typename Launch>
void register_trunk(torch::stable::detail::StableLibrary& m) {
  using T = Trunk<Launch>;
  m.impl("prepare_weights", TORCH_BOX(&T::prepare_weights));
  m.impl("fold_weights", TORCH_BOX(&T::fold_weights));
  m.impl("stem_forward", TORCH_BOX(&T::stem_forward));
  m.impl("stem_evaluate", TORCH_BOX(&T::stem_evaluate));
  m.impl("conv3x3_f1", TORCH_BOX(&T::conv3x3_f1));
  m.impl("conv3x3_f2", TORCH_BOX(&T::conv3x3_f2));
  m.impl("conv3x3_evaluate", TORCH_BOX(&T::conv3x3_evaluate));
  m.impl("head_forward", TORCH_BOX(&T::head_forward));
  m.impl("head_backward", TORCH_BOX(&T::head_backward));
  m.impl("conv3x3_b2", TORCH_BOX(&T::conv3x3_b2));
  m.impl("conv3x3_b1", TORCH_BOX(&T::conv3x3_b1));
  m.impl("stem_backward", TORCH_BOX(&T::stem_backward));
  m.impl("sum_slabs", TORCH_BOX(&T::sum_slabs));
}

}  // namespace cifar_resnet_fast
