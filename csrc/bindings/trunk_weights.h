// A step's weights in the order in which the kernels take them: weights/weights.h.
#pragma once

#include <tuple>

#include "bindings/trunk_tensors.h"
#include "weights/weights.h"

namespace cifar_resnet_fast::trunk {

// elements of the fragments of a weight, in one direction
inline int64_t fragment_elements(const Tensor& weight) {
  return weight.size(1) == 3 ? kStemFragments : weight.numel();
}

// `layers` with what training and evaluation have in common; forward fragments from `first` on,
// each followed by the backward ones where `both`
template <typename Launch>
std::vector<LayerWeights> layers_of(const Launch& launch, const Tensors& weights,
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

inline Tensor empty_fragments(const Tensors& weights, const Tensor& like, bool both) {
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
template <typename Launch>
Tensor prepare_weights(Tensors weights, Tensor like) {
  const Dtype dtype = dtype_of("like", like);
  const Tensor fragments = empty_fragments(weights, like, true);
  const Launch launch("prepare_weights", like);
  const auto layers = layers_of(launch, weights, fragments, true);
  launch.check(::cifar_resnet_fast::prepare_weights(layers.data(), static_cast<int>(layers.size()),
                                                    dtype, launch.stream()));
  return fragments;
}

// fragments: forward ones, layer after layer; biases: [sum of K] float32
template <typename Launch>
std::tuple<Tensor, Tensor> fold_weights(Tensors weights, Tensors bn_weights, Tensors bn_biases,
                                        Tensors running_means, Tensors running_vars,
                                        std::vector<double> eps, Tensor like) {
  const Dtype dtype = dtype_of("like", like);
  const Tensor fragments = empty_fragments(weights, like, false);
  const size_t count = weights.size();
  check(bn_weights.size() == count && bn_biases.size() == count && running_means.size() == count &&
            running_vars.size() == count && eps.size() == count,
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
  launch.check(::cifar_resnet_fast::prepare_weights(layers.data(), static_cast<int>(count), dtype,
                                                    launch.stream()));
  return {fragments, biases};
}

}  // namespace cifar_resnet_fast::trunk
