// Starting a kernel; host code. Like warp.cuh, replaced as a whole by tests/emulation/emulator.h.
#ifndef CIFAR_RESNET_FAST_LAUNCH_CUH_
#define CIFAR_RESNET_FAST_LAUNCH_CUH_

#include <cuda_runtime.h>

namespace cifar_resnet_fast {

struct LaunchShape {
  int blocks;
  int threads;
  int shared_bytes;
  // start while the kernel before still runs; ignored by code for less than sm_90
  bool overlap;
  void* stream;
  int rows = 1;  // of so many blocks each
};

// Drivers of CUDA 12.3 and later: before, a CUDA graph could not say that kernels overlap.
inline bool graphs_hold_overlap() {
  static const bool holds = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  return holds;
}

// 0, or the cudaError_t of the launch, which the runtime then forgets: it would hand it to whoever
// asks next, and that is PyTorch behind some kernel of its own.
template <class Params>
int launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shape.shared_bytes);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks, shape.rows);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = &overlap;
  config.numAttrs = 0;
  if (error == cudaSuccess && shape.overlap) {
    // by what the kernel was compiled for, not by the card: code for sm_80 does not wait
    cudaFuncAttributes attributes = {};
    error = cudaFuncGetAttributes(&attributes, kernel);
    config.numAttrs = attributes.ptxVersion >= 90 && graphs_hold_overlap() ? 1 : 0;
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, params);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace cifar_resnet_fast

#endif  // CIFAR_RESNET_FAST_LAUNCH_CUH_
