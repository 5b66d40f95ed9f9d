// Library _C: the operations' schemas and their CPU code, the CUDA kernels' twins in plain loops.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>
#include <vector>

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
        if (source == NOWHERE) {
          std::memset(to_image + u * BYTES, 0, BYTES);
        } else {
          std::memcpy(to_image + u * BYTES, from_image + source * BYTES, BYTES);
        }
      }
    }
  });
}

template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The loops below run over elements, each found through the chunk that holds it.
template <typename T>
void border_forward(const StageBorderForward& p, size_t chunk_bytes) {
  using Real = RealOf<T>;
  const ShortcutA& shape = p.shape;
  const uint32_t V = static_cast<uint32_t>(chunk_bytes / sizeof(T));
  const auto *scale = static_cast<const Real*>(p.scale),
             *shift = static_cast<const Real*>(p.shift);
  torch::stable::parallel_for(0, shape.N, images_a_thread(shape), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(p.x) + n * shape.x_chunks() * V;
      const T* y = static_cast<const T*>(p.y) + n * shape.out_chunks() * V;
      T* out = static_cast<T*>(p.out) + n * shape.out_chunks() * V;
      for (uint32_t u = 0; u < shape.out_chunks(); ++u) {
        const uint32_t source = chunk_in_x(shape, u);
        for (uint32_t i = 0; i < V; ++i) {
          const uint32_t k = u % shape.out_channels * V + i;
          const Real shortcut = source == NOWHERE ? Real(0) : Real(x[source * V + i]);
          out[u * V + i] = T(stage_border_value(scale[k], Real(y[u * V + i]), shift[k], shortcut));
        }
      }
    }
  });
}

template <typename T>
void border_backward(const StageBorderBackward& p, size_t chunk_bytes) {
  using Real = RealOf<T>;
  const ShortcutA& shape = p.shape;
  const uint32_t V = static_cast<uint32_t>(chunk_bytes / sizeof(T));
  const uint32_t K = shape.out_channels * V;
  const auto* scale = static_cast<const Real*>(p.scale);
  std::vector<double> image_sums(shape.N * 2 * K);  // of dz * y, then of dz, a row an image
  torch::stable::parallel_for(0, shape.N, images_a_thread(shape), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = n * shape.out_chunks() * V;
      const T* dout = static_cast<const T*>(p.dout) + first;
      const T* out = static_cast<const T*>(p.out) + first;
      const T* y = static_cast<const T*>(p.y) + first;
      T* dy = static_cast<T*>(p.dy) + first;
      T* dx = static_cast<T*>(p.dx) + n * shape.x_chunks() * V;
      double *dscale = &image_sums[n * 2 * K], *dshift = dscale + K;
      for (uint32_t e = 0; e < shape.out_chunks() * V; ++e) {
        const Real dz = stage_border_dz(Real(dout[e]), Real(out[e]));
        dy[e] = T(scale[e % K] * dz);
        dscale[e % K] += double(dz) * double(Real(y[e]));
        dshift[e % K] += double(dz);
      }
      for (uint32_t u = 0; u < shape.x_chunks(); ++u) {
        const uint32_t source = chunk_in_out(shape, u);
        for (uint32_t i = 0; i < V; ++i) {
          const uint32_t s = source * V + i;
          dx[u * V + i] =
              source == NOWHERE ? T(0) : T(stage_border_dz(Real(dout[s]), Real(out[s])));
        }
      }
    }
  });
  for (uint32_t k = 0; k < K; ++k) {
    double dscale = 0, dshift = 0;
    for (int64_t n = 0; n < shape.N; ++n) {
      dscale += image_sums[n * 2 * K + k];
      dshift += image_sums[n * 2 * K + K + k];
    }
    static_cast<Real*>(p.dscale)[k] = static_cast<Real>(dscale);
    static_cast<Real*>(p.dshift)[k] = static_cast<Real>(dshift);
  }
}

template <typename F>
void with_type(ElementType type, F f) {
  switch (type) {
    case ElementType::float16:
      return f(torch::headeronly::Half());
    case ElementType::bfloat16:
      return f(torch::headeronly::BFloat16());
    case ElementType::float32:
      return f(float());
    case ElementType::float64:
      return f(double());
  }
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

  static void stage_border_forward(const StageBorderForward& p, ElementType type,
                                   size_t chunk_bytes, const Tensor&) {
    with_type(type, [&](auto zero) { border_forward<decltype(zero)>(p, chunk_bytes); });
  }

  static void stage_border_backward(const StageBorderBackward& p, ElementType type,
                                    size_t chunk_bytes, const Tensor&) {
    with_type(type, [&](auto zero) { border_backward<decltype(zero)>(p, chunk_bytes); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(cifar_resnet_fast, m) {
  m.def("shortcut_a(Tensor x, SymInt out_channels, int stride) -> Tensor");
  m.def(
      "shortcut_a_backward(Tensor dout, SymInt channels, SymInt height, SymInt width, int stride)"
      " -> Tensor dx");
  m.def("stage_border(Tensor y, Tensor scale, Tensor shift, Tensor x, int stride) -> Tensor");
  m.def(
      "stage_border_backward(Tensor dout, Tensor out, Tensor y, Tensor scale, SymInt channels,"
      " SymInt height, SymInt width, int stride)"
      " -> (Tensor dy, Tensor dscale, Tensor dshift, Tensor dx)");
  define_trunk(m);
}

STABLE_TORCH_LIBRARY_IMPL(cifar_resnet_fast, CPU, m) {
  register_operations<Cpu>(m);
}

}  // namespace cifar_resnet_fast

EMPTY_PYTHON_MODULE(_C)
