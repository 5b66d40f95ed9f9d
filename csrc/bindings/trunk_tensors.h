// What the trunk's operations check and allocate, and how their tensors reach a kernel.
//
// `Launch` is made from the operation's name and a tensor, and while it lives kernels run on that
// tensor's device: `stream()` is where, `reads` and `writes` give a tensor's memory, `check` takes
// a kernel's status. cuda.cpp has the real one; tests/emulation one that runs them on a CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "bindings/operations.h"
#include "conv3x3/conv3x3.h"

namespace cifar_resnet_fast::trunk {

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

// The kernels' offsets in bytes fit in 31 bits then.
inline void check_batch(const char* name, const Tensor& tensor) {
  check(tensor.size(0) <= 65535, name, " must have at most 65535 images, got ", tensor.size(0));
}

// `tensor` is an activation of `channels` with the batch, dtype and device of `like`.
inline void check_stage(const char* name, const Tensor& tensor, int64_t channels,
                        const Tensor& like) {
  check_tensor(name, tensor, {"N", "C", "S", "S"});
  check_batch(name, tensor);
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

inline void check_images(const Tensor& images) {
  check_tensor("images", images, {"N", "C", "H", "W"});
  check_batch("images", images);
  check_shape("images", images, {images.size(0), 4, 32, 32});
  check_channels_last("images", images);
  check_aligned("images", images, 8);
}

inline int check_blocks(int64_t blocks) {
  check(blocks >= 1 && blocks <= 65535, "blocks must be in 1 .. 65535, got ", blocks);
  return static_cast<int>(blocks);
}

inline int batch_of(const Tensor& tensor) {
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
const float* floats(const Launch& launch, const Tensor& tensor) {
  return static_cast<const float*>(launch.reads(tensor));
}

template <typename Launch>
float* new_floats(const Launch& launch, const Tensor& tensor) {
  return static_cast<float*>(launch.writes(tensor));
}

// What is added to an activation of y's shape: of that shape, or of the stage before.
template <typename Launch>
Shortcut shortcut_of(const Launch& launch, const Tensor& shortcut, const Tensor& y,
                     const void*& memory) {
  const bool option_a = shortcut.dim() == 4 && shortcut.size(1) * 2 == y.size(1);
  check_stage("shortcut", shortcut, option_a ? y.size(1) / 2 : y.size(1), y);
  memory = launch.reads(shortcut);
  return option_a ? Shortcut::kOptionA : Shortcut::kIdentity;
}

}  // namespace cifar_resnet_fast::trunk
