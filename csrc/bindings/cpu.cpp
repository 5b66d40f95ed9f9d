// Library _C: the operations' schemas and their CPU code, the CUDA kernels' twins in plain loops.
#include <cstring>

#include "bindings/operations.h"
#include "bindings/python_module.h"
#include "bindings/trunk.h"

namespace cifar_resnet_fast {
namespace {

// A thread takes as many images as make about this many chunks worth its while.
int64_t images_a_thread(const ShortcutA& shape) {
  return std::max<int64_t>(1, 32768 / (shape.x_chunks() + shape.out_chunks()));
}

template <size_t BYTES>
void gather(const ShortcutA& shape, bool backward, const char* from, char* to) {
  const int64_t from_chunks = backward ? shape.out_chunks() : shape.x_chunks();
  const uint32_t to_chunks = backward ? shape.x_chunks() : shape.out_chunks();
  torch::stable::parallel_for(0, shape.N, images_a_thread(shape), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const char* from_image = from + n * from_chunks * int64_t{BYTES};
      char* to_image = to + n * to_chunks * int64_t{BYTES};
      for (uint32_t u = 0; u < to_chunks; ++u) {
        const uint32_t source = backward ? chunk_in_out(shape, u) : chunk_in_x(shape, u);
        if (source == kNowhere) {
          std::memset(to_image + u * BYTES, 0, BYTES);
        } else {
          std::memcpy(to_image + u * BYTES, from_image + source * BYTES, BYTES);
        }
      }
    }
  });
}

struct Cpu {
  static void shortcut_a(const ShortcutA& shape, bool backward, size_t chunk_bytes,
                         const Tensor& from, const Tensor& to) {
    const auto* source = static_cast<const char*>(from.const_data_ptr());
    auto* target = static_cast<char*>(to.mutable_data_ptr());
    switch (chunk_bytes) {
      case 2:
        return gather<2>(shape, backward, source, target);
      case 4:
        return gather<4>(shape, backward, source, target);
      case 8:
        return gather<8>(shape, backward, source, target);
      default:
        return gather<16>(shape, backward, source, target);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(cifar_resnet_fast, m) {
  m.def("shortcut_a(Tensor x, SymInt out_channels, int stride) -> Tensor");
  m.def(
      "shortcut_a_backward(Tensor dout, SymInt channels, SymInt height, SymInt width, int stride)"
      " -> Tensor dx");
  define_trunk(m);
}

STABLE_TORCH_LIBRARY_IMPL(cifar_resnet_fast, CPU, m) {
  register_operations<Cpu>(m);
}

}  // namespace cifar_resnet_fast

EMPTY_PYTHON_MODULE(_C)
