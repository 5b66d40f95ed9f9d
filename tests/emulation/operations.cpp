// The trunk's operations of csrc/bindings/trunk.h on CPU tensors, with the emulated kernels;
// loaded by torch.ops.load_library after the package's _C, which has their names.
//
// This file is compiled without emulator.h, whose stand-ins for CUDA's types would meet torch's.
#include "bindings/trunk.h"
#include "engine.h"

namespace cifar_resnet_fast {
namespace {

// A kernel may touch the tensors that its operation named, and nothing else.
class EmulatedLaunch {
 public:
  EmulatedLaunch(const char* operation, const Tensor&) : operation_(operation) {}
  ~EmulatedLaunch() { forbid_all(); }
  void* stream() const { return nullptr; }
  const void* reads(const Tensor& tensor) const {
    allow(tensor.const_data_ptr(), bytes_of(tensor), false);
    return tensor.const_data_ptr();
  }
  void* writes(const Tensor& tensor) const {
    allow(tensor.mutable_data_ptr(), bytes_of(tensor), true);
    return tensor.mutable_data_ptr();
  }
  void check(int status) const {
    cifar_resnet_fast::check(status == 0, operation_, ": status ", status);
  }

 private:
  static size_t bytes_of(const Tensor& tensor) {
    return static_cast<size_t>(tensor.numel()) * tensor.element_size();
  }
  const char* operation_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cifar_resnet_fast, CPU, m) {
  register_trunk<EmulatedLaunch>(m);
}

}  // namespace cifar_resnet_fast
