// A stand-in for the CUDA runtime, as far as the package's launchers use it: it records what is
// launched and hands it to the machine. Linked to the launchers in place of libcudart, with the C
// names that nvcc's host code calls.
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "engine.h"
#include "hooks.h"

namespace {

const PtxHooks* hooks = nullptr;
std::unordered_map<const void*, int> shared_limits;  // as cudaFuncSetAttribute raised them
bool overlapped = false;
cudaError_t last_error = cudaSuccess;

// by their host functions; nvcc's code registers them before main, in no order with what is here
std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> registered;
  return registered;
}

constexpr size_t kUsualShared = 48 * 1024;
int most_shared() {
  const int architecture = hooks->architecture(hooks->context);
  return architecture >= 90 ? 232448 : architecture == 80 ? 166912 : 101376;
}

cudaError_t start(const void* function, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                  bool overlaps) {
  const auto kernel = kernels().find(function);
  if (kernel == kernels().end()) return last_error = cudaErrorInvalidDeviceFunction;
  const auto limit = shared_limits.find(function);
  if (shared > (limit == shared_limits.end() ? kUsualShared : limit->second)) {
    return last_error = cudaErrorInvalidValue;
  }
  overlapped = overlaps;
  const PtxLaunch launch = {kernel->second.c_str(),
                            {blocks.x, blocks.y, blocks.z},
                            {threads.x, threads.y, threads.z},
                            shared,
                            arguments,
                            overlaps};
  if (hooks->launch(hooks->context, &launch) != 0) last_error = cudaErrorLaunchFailure;
  return last_error;
}

struct {
  dim3 blocks, threads;
  size_t shared;
  void* stream;
} configuration;

}  // namespace

namespace cifar_resnet_fast {

void set_order(Order) {}  // Python sets the machine's
void allow(const void* start, size_t bytes, bool writable) {
  hooks->allow(hooks->context, start, bytes, writable);
}
void forbid_all() {
  hooks->forbid_all(hooks->context);
}
bool last_overlapped() {
  return overlapped;
}

}  // namespace cifar_resnet_fast

extern "C" {

void ptx_attach(const PtxHooks* attached) {
  hooks = attached;
}

// ---- what nvcc's host code calls to make kernels known, and for <<<...>>> ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
  return 1;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, void* stream) {
  configuration = {blocks, threads, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* shared,
                                       void** stream) {
  *blocks = configuration.blocks;
  *threads = configuration.threads;
  *shared = configuration.shared;
  *stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                               size_t shared, void*) {
  return start(kernel, blocks, threads, arguments, shared, false);
}

// ---- the runtime's own ----

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                             size_t shared, cudaStream_t) {
  return start(kernel, blocks, threads, arguments, shared, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  return start(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
               config->numAttrs != 0);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most_shared()) {
    return last_error = cudaErrorInvalidValue;
  }
  shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = hooks->architecture(hooks->context);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return last_error;
}

}  // extern "C"
