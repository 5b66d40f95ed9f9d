// The emulated kernels for Python: the params structs of csrc/kernels by field, and the functions
// that take them. A pointer field is set to (address, bytes): the kernels may then touch that
// range, and write it where the field is not const. Each call ends with nothing allowed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "conv3x3.h"
#include "emulator.h"
#include "weights.h"

namespace py = pybind11;
using namespace cifar_resnet_fast;

namespace {

template <class Struct>
struct Bound {
  py::class_<Struct> type;

  Bound(py::module_& m, const char* name) : type(m, name, py::dynamic_attr()) {
    type.def(py::init([] { return Struct{}; }));
  }
  template <class Field>
  Bound& field(const char* name, Field Struct::* member) {
    if constexpr (std::is_pointer_v<Field>) {
      type.def_property(
          name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
          [member](Struct& s, std::pair<uintptr_t, size_t> range) {
            s.*member = reinterpret_cast<Field>(range.first);
            allow(s.*member, range.second, !std::is_const_v<std::remove_pointer_t<Field>>);
          });
    } else {
      type.def_readwrite(name, member);
    }
    return *this;
  }
};

struct ForbidAtEnd {
  ~ForbidAtEnd() { forbid_all(); }
};

}  // namespace

PYBIND11_MODULE(emulated_kernels, m) {
  py::enum_<Order>(m, "Order")
      .value("round_robin", Order::kRoundRobin)
      .value("first_warp_first", Order::kFirstWarpFirst)
      .value("last_warp_first", Order::kLastWarpFirst);
  m.def("set_order", set_order);
  py::enum_<Dtype>(m, "Dtype")
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16);
  py::enum_<Shortcut>(m, "Shortcut")
      .value("none", Shortcut::kNone)
      .value("identity", Shortcut::kIdentity)
      .value("option_a", Shortcut::kOptionA);

  Bound<ForwardNorm>(m, "ForwardNorm")
      .field("sums", &ForwardNorm::sums)
      .field("rows", &ForwardNorm::rows)
      .field("weight", &ForwardNorm::weight)
      .field("bias", &ForwardNorm::bias)
      .field("running_mean", &ForwardNorm::running_mean)
      .field("running_var", &ForwardNorm::running_var)
      .field("saved", &ForwardNorm::saved)
      .field("momentum", &ForwardNorm::momentum)
      .field("eps", &ForwardNorm::eps);
  Bound<ForwardParams>(m, "ForwardParams")
      .field("y", &ForwardParams::y)
      .field("norm", &ForwardParams::norm)
      .field("shortcut", &ForwardParams::shortcut)
      .field("shortcut_kind", &ForwardParams::shortcut_kind)
      .field("x", &ForwardParams::x)
      .field("weight", &ForwardParams::weight)
      .field("out", &ForwardParams::out)
      .field("out_sums", &ForwardParams::out_sums)
      .field("images", &ForwardParams::images);
  m.def(
      "conv3x3_forward",
      [](const ForwardParams& p, Dtype dtype, int channels, int stride, int blocks) {
        ForbidAtEnd end;
        return conv3x3_forward(p, dtype, channels, stride, blocks, true, nullptr);
      },
      py::arg("params"), py::arg("dtype"), py::arg("channels"), py::arg("stride"),
      py::arg("blocks"));

  Bound<BackwardNorm>(m, "BackwardNorm")
      .field("sums", &BackwardNorm::sums)
      .field("rows", &BackwardNorm::rows)
      .field("weight", &BackwardNorm::weight)
      .field("saved", &BackwardNorm::saved)
      .field("dweight", &BackwardNorm::dweight)
      .field("dbias", &BackwardNorm::dbias);
  Bound<SlabSum>(m, "SlabSum")
      .field("slabs", &SlabSum::slabs)
      .field("count", &SlabSum::count)
      .field("C", &SlabSum::C)
      .field("K", &SlabSum::K)
      .field("C_kept", &SlabSum::C_kept)
      .field("dweight", &SlabSum::dweight);
  Bound<BackwardParams>(m, "BackwardParams")
      .field("dz", &BackwardParams::dz)
      .field("y", &BackwardParams::y)
      .field("norm", &BackwardParams::norm)
      .field("input", &BackwardParams::input)
      .field("saved_before", &BackwardParams::saved_before)
      .field("residual", &BackwardParams::residual)
      .field("y_before", &BackwardParams::y_before)
      .field("weight", &BackwardParams::weight)
      .field("out", &BackwardParams::out)
      .field("out_sums", &BackwardParams::out_sums)
      .field("slabs", &BackwardParams::slabs)
      .field("before", &BackwardParams::before)
      .field("images", &BackwardParams::images);
  m.def("conv3x3_backward_rows", conv3x3_backward_rows);
  m.def(
      "conv3x3_backward",
      [](const BackwardParams& p, Dtype dtype, int channels, int stride, int blocks) {
        ForbidAtEnd end;
        return conv3x3_backward(p, dtype, channels, stride, blocks, true, nullptr);
      },
      py::arg("params"), py::arg("dtype"), py::arg("channels"), py::arg("stride"),
      py::arg("blocks"));

  Bound<LayerWeights>(m, "LayerWeights")
      .field("weight", &LayerWeights::weight)
      .field("forward", &LayerWeights::forward)
      .field("backward", &LayerWeights::backward)
      .field("C", &LayerWeights::C)
      .field("K", &LayerWeights::K);
  m.def(
      "prepare_weights",
      [](const std::vector<LayerWeights>& layers, Dtype dtype) {
        ForbidAtEnd end;
        return prepare_weights(layers.data(), static_cast<int>(layers.size()), dtype, nullptr);
      },
      py::arg("layers"), py::arg("dtype"));
}
