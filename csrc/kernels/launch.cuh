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
};

// 0, or the cudaError_t of the launch
template <class Params>
int launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shape.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = &overlap;
  config.numAttrs = 0;
  if (shape.overlap) {
    // by what the kernel was compiled for, not by the card: code for sm_80 does not wait
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace cifar_resnet_fast

#endif  // CIFAR_RESNET_FAST_LAUNCH_CUH_
