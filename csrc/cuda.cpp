// Library _cuda: the operations on CUDA tensors, launched on the tensor's device and on its
// current stream. Nothing waits for the device, so a CUDA graph can capture every call.
#include <torch/csrc/stable/accelerator.h>

#include "operations.h"
#include "python_module.h"

// exported by every torch from 2.11 on; its header came later
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace cifar_resnet_fast {
namespace {

// The device of `tensor` made current while this lives, and the stream to launch on.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) ==
                        AOTI_TORCH_SUCCESS,
                    "no current CUDA stream on device ", tensor.get_device_index());
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_launch(const char* operation, int error) {
  check(error == 0, operation, ": the kernel could not be launched, cudaError_t ", error);
}

struct Cuda {
  static void shortcut_a(const ShortcutA& shape, bool backward, size_t unit_bytes,
                         const Tensor& from, const Tensor& to) {
    const Launch launch(from);
    check_launch("shortcut_a",
                 launch_shortcut_a(shape, backward, unit_bytes, from.const_data_ptr(),
                                   to.mutable_data_ptr(), launch.stream()));
  }

  static void stage_border_forward(const StageBorderForward& p, ElementType type,
                                   size_t unit_bytes, const Tensor& x) {
    const Launch launch(x);
    check_launch("stage_border",
                 launch_stage_border_forward(p, type, unit_bytes, launch.stream()));
  }

  static void stage_border_backward(StageBorderBackward& p, ElementType type, size_t unit_bytes,
                                    const Tensor& scale) {
    const Launch launch(scale);
    const BlockGrid grid = stage_border_grid(p.shape);
    const Tensor partial_sums =
        torch::stable::new_empty(scale, {int64_t{grid.images} * grid.parts, 2, scale.size(0)});
    p.partial_sums = partial_sums.mutable_data_ptr();
    check_launch("stage_border_backward",
                 launch_stage_border_backward(p, type, unit_bytes, launch.stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cifar_resnet_fast, CUDA, m) {
  register_operations<Cuda>(m);
}

}  // namespace cifar_resnet_fast

EMPTY_PYTHON_MODULE(_cuda)
