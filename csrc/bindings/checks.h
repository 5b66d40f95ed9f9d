// Argument checks of the operations in C++, before anything is launched. Rules and words are those
// of cifar_resnet_fast/ops/_checks.py, for callers that come straight through torch.ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cifar_resnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints a tuple.
template <typename Values>
std::string tuple_text(const Values& values) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

// `tensor` is floating and has one axis a name in `axes`, none of them empty.
inline void check_tensor(const char* name, const Tensor& tensor,
                         std::initializer_list<const char*> axes) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
            dtype == ScalarType::Double,
        name, " must be of a floating dtype, got ", dtype_text(dtype));
  std::string letters;
  for (const char* axis : axes) letters += (letters.empty() ? "" : ", ") + std::string(axis);
  check(tensor.dim() == static_cast<int64_t>(axes.size()) && tensor.numel() != 0, name,
        " must be [", letters, "] with no axis empty, got shape ", tuple_text(tensor.sizes()));
}

// `tensor` lives where x does.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  check(tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(), name,
        " must be on the device of x, ", device_text(x), ", got ", device_text(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, " must be ", dtype_text(dtype), ", got ",
        dtype_text(tensor.scalar_type()));
}

inline void check_shape(const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == shape.size();
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = sizes[i] == shape[i];
  check(equal, name, " must have shape ", tuple_text(shape), ", got ", tuple_text(sizes));
}

// A row-major [N, H, W, C] array; the stride of an axis of length 1 does not matter.
inline void check_channels_last(const char* name, const Tensor& tensor) {
  int64_t expected = 1;
  bool channels_last = true;
  for (const int axis : {1, 3, 2, 0}) {
    channels_last &= tensor.size(axis) == 1 || tensor.stride(axis) == expected;
    expected *= tensor.size(axis);
  }
  check(channels_last, name, " must be channels-last [N, C, H, W], got strides ",
        tuple_text(tensor.strides()));
}

inline void check_stride(int64_t stride) {
  check(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
}

inline void check_out_channels(const char* rule, int64_t C, int64_t K) {
  check(K >= C && (K - C) % 2 == 0, rule, " must be x's ", C,
        " channels or an even number more, got ", K);
}

}  // namespace cifar_resnet_fast
