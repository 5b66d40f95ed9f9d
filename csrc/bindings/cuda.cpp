// Library _cuda: the operations on CUDA tensors, launched on the tensor's device and on its
// current stream. Nothing waits for the device, so a CUDA graph can capture every call.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/operations.h"
#include "bindings/python_module.h"
#include "bindings/trunk.h"

// exported by every torch from 2.11 on; its header came later
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace cifar_resnet_fast {
namespace {

// One operation's launches: the device of `tensor` is current while this lives, and `stream()` is
// the current one there.
class Launch {
 public:
  Launch(const char* operation, const Tensor& tensor)
      : operation_(operation), guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) ==
                        AOTI_TORCH_SUCCESS,
                    "no current CUDA stream on device ", tensor.get_device_index());
  }
  void* stream() const { return stream_; }
  const void* reads(const Tensor& tensor) const { return tensor.const_data_ptr(); }
  void* writes(const Tensor& tensor) const { return tensor.mutable_data_ptr(); }
  // of a kernel: 0, a cudaError_t, or kNoKernel
  void check(int status) const {
    cifar_resnet_fast::check(status != kNoKernel, operation_,
                             ": there is no kernel for these channels and this stride");
    cifar_resnet_fast::check(status == 0, operation_,
                             ": the kernel could not be launched, cudaError_t ", status);
  }

 private:
  const char* operation_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

struct Cuda {
  static void shortcut_a(const ShortcutA& shape, bool backward, size_t chunk_bytes,
                         const Tensor& from, const Tensor& to) {
    const Launch launch("shortcut_a", from);
    launch.check(launch_shortcut_a({shape, launch.reads(from), launch.writes(to)}, backward,
                                   chunk_bytes, launch.stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cifar_resnet_fast, CUDA, m) {
  register_operations<Cuda>(m);
  register_trunk<Launch>(m);
}

}  // namespace cifar_resnet_fast

EMPTY_PYTHON_MODULE(_cuda)
