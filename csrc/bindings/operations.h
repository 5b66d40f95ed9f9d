// The operations as torch calls them: check, allocate, hand over to a Backend, which cpu.cpp and
// cuda.cpp supply. One text for both, so that they take and refuse the same arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include "bindings/checks.h"
#include "shortcut_a/shortcut_a.cuh"

namespace cifar_resnet_fast {

inline Tensor empty_channels_last(const std::vector<int64_t>& nchw, const Tensor& like) {
  return torch::stable::empty(nchw, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// 16 where all channel counts and addresses are whole numbers of 16 bytes, else one element.
inline size_t chunk_size(size_t element_size, int64_t C, int64_t K,
                         std::initializer_list<const Tensor*> tensors) {
  uintptr_t bits = static_cast<uintptr_t>(C * element_size) |
                   static_cast<uintptr_t>((K - C) / 2 * element_size);
  for (const Tensor* tensor : tensors) {
    bits |= reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
  }
  return bits % 16 == 0 ? 16 : element_size;
}

// Of x [N, C, H, W] and of the result [N, K, Ho, Wo].
struct Sizes {
  int64_t N, H, W, C, K, Ho, Wo, stride;

  Sizes(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t stride)
      : N(N),
        H(H),
        W(W),
        C(C),
        K(K),
        Ho((H + stride - 1) / stride),
        Wo((W + stride - 1) / stride),
        stride(stride) {
    constexpr int64_t LIMIT = int64_t{1} << 31;  // of the index arithmetic inside an image
    check(H * W * C < LIMIT && Ho * Wo * K < LIMIT,
          "x must have fewer than 2**31 elements an image, and so must the result, got ",
          H * W * C, " and ", Ho * Wo * K);
  }

  std::vector<int64_t> x_shape() const { return {N, C, H, W}; }
  std::vector<int64_t> out_shape() const { return {N, K, Ho, Wo}; }
  ShortcutA in_chunks(size_t elements_per_chunk) const {
    return make_shortcut_a(N, H, W, C, K, stride, static_cast<int64_t>(elements_per_chunk));
  }
};

inline void check_activation(const char* name, const Tensor& tensor, const char* channels) {
  check_tensor(name, tensor, {"N", channels, "H", "W"});
}

// A gradient is given, and with it the sizes of the x that the result has.
inline Sizes check_gradient(const Tensor& dout, int64_t channels, int64_t height, int64_t width,
                            int64_t stride) {
  check_stride(stride);
  check_activation("dout", dout, "K");
  check(channels > 0 && height > 0 && width > 0,
        "channels, height and width must be positive, got ",
        tuple_text(std::vector<int64_t>{channels, height, width}));
  check_out_channels("dout's channels", channels, dout.size(1));
  const Sizes sizes(dout.size(0), channels, height, width, dout.size(1), stride);
  check_shape("dout", dout, sizes.out_shape());
  check_channels_last("dout", dout);
  return sizes;
}

template <typename Backend>
Tensor shortcut_a(const Tensor& x, int64_t out_channels, int64_t stride) {
  check_stride(stride);
  check_activation("x", x, "C");
  check_out_channels("out_channels", x.size(1), out_channels);
  check_channels_last("x", x);
  const Sizes sizes(x.size(0), x.size(1), x.size(2), x.size(3), out_channels, stride);
  const Tensor out = empty_channels_last(sizes.out_shape(), x);
  const size_t chunk = chunk_size(x.element_size(), sizes.C, sizes.K, {&x, &out});
  Backend::shortcut_a(sizes.in_chunks(chunk / x.element_size()), false, chunk, x, out);
  return out;
}

template <typename Backend>
Tensor shortcut_a_backward(const Tensor& dout, int64_t channels, int64_t height, int64_t width,
                           int64_t stride) {
  const Sizes sizes = check_gradient(dout, channels, height, width, stride);
  const Tensor dx = empty_channels_last(sizes.x_shape(), dout);
  const size_t chunk = chunk_size(dout.element_size(), sizes.C, sizes.K, {&dout, &dx});
  Backend::shortcut_a(sizes.in_chunks(chunk / dout.element_size()), true, chunk, dout, dx);
  return dx;
}

// Registers every operation for one dispatch key.
template <typename Backend>
void register_operations(torch::stable::detail::StableLibrary& m) {
  m.impl("shortcut_a", TORCH_BOX(&shortcut_a<Backend>));
  m.impl("shortcut_a_backward", TORCH_BOX(&shortcut_a_backward<Backend>));
}

}  // namespace cifar_resnet_fast
