// The emulated kernels for ctypes: a table of the params structs' fields, and C functions that
// take the structs by address. What the emulator finds wrong comes back as kFailed and a text.
#include <cstddef>
#include <string>
#include <type_traits>

#include "conv3x3/conv3x3.h"
#include "engine.h"
#include "pool/pool.h"
#include "shortcut_a/shortcut_a.cuh"
#include "stem/stem.h"
#include "weights/weights.h"

using namespace cifar_resnet_fast;

namespace {

constexpr int kFailed = -1000;
std::string failure;

struct Field {
  const char* structure;
  const char* name;
  const char* type;  // "read", "write" (pointers), "int", "float", or a structure
  int offset;
};

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_pointer_v<T>) {
    return std::is_const_v<std::remove_pointer_t<T>> ? "read" : "write";
  } else if constexpr (std::is_same_v<T, float>) {
    return "float";
  } else {
    static_assert(sizeof(T) == sizeof(int) && (std::is_enum_v<T> || std::is_same_v<T, int>));
    return "int";
  }
}

#define FIELD(S, name) {#S, #name, type_name<decltype(S::name)>(), offsetof(S, name)}
#define STRUCT(S, name, Inner) {#S, #name, #Inner, offsetof(S, name)}

// inner structures first
const Field kFields[] = {
    FIELD(BatchNormForward, sums),
    FIELD(BatchNormForward, rows),
    FIELD(BatchNormForward, weight),
    FIELD(BatchNormForward, bias),
    FIELD(BatchNormForward, running_mean),
    FIELD(BatchNormForward, running_var),
    FIELD(BatchNormForward, norm),
    FIELD(BatchNormForward, momentum),
    FIELD(BatchNormForward, eps),
    FIELD(BatchNormBackward, sums),
    FIELD(BatchNormBackward, rows),
    FIELD(BatchNormBackward, weight),
    FIELD(BatchNormBackward, norm),
    FIELD(BatchNormBackward, dweight),
    FIELD(BatchNormBackward, dbias),
    FIELD(SlabSum, slabs),
    FIELD(SlabSum, count),
    FIELD(SlabSum, C),
    FIELD(SlabSum, K),
    FIELD(SlabSum, C_kept),
    FIELD(SlabSum, dweight),
    FIELD(SlabSum, layout),
    FIELD(ForwardParams, y),
    STRUCT(ForwardParams, bn, BatchNormForward),
    FIELD(ForwardParams, shortcut),
    FIELD(ForwardParams, shortcut_kind),
    FIELD(ForwardParams, x),
    FIELD(ForwardParams, fragments),
    FIELD(ForwardParams, out),
    FIELD(ForwardParams, out_sums),
    FIELD(ForwardParams, batch),
    FIELD(EvaluateParams, x),
    FIELD(EvaluateParams, fragments),
    FIELD(EvaluateParams, bias),
    FIELD(EvaluateParams, shortcut),
    FIELD(EvaluateParams, shortcut_kind),
    FIELD(EvaluateParams, out),
    FIELD(EvaluateParams, batch),
    FIELD(BackwardParams, dz),
    FIELD(BackwardParams, y),
    STRUCT(BackwardParams, bn, BatchNormBackward),
    FIELD(BackwardParams, input),
    FIELD(BackwardParams, residual),
    FIELD(BackwardParams, y_before),
    FIELD(BackwardParams, norm_before),
    FIELD(BackwardParams, fragments),
    FIELD(BackwardParams, out),
    FIELD(BackwardParams, out_sums),
    FIELD(BackwardParams, slabs),
    STRUCT(BackwardParams, before, SlabSum),
    FIELD(BackwardParams, batch),
    FIELD(StemForwardParams, images),
    FIELD(StemForwardParams, fragments),
    FIELD(StemForwardParams, bias),
    FIELD(StemForwardParams, y),
    FIELD(StemForwardParams, y_sums),
    FIELD(StemForwardParams, batch),
    FIELD(StemBackwardParams, dz),
    FIELD(StemBackwardParams, y),
    STRUCT(StemBackwardParams, bn, BatchNormBackward),
    FIELD(StemBackwardParams, images),
    FIELD(StemBackwardParams, slabs),
    STRUCT(StemBackwardParams, before, SlabSum),
    FIELD(StemBackwardParams, batch),
    FIELD(PoolForwardParams, y),
    STRUCT(PoolForwardParams, bn, BatchNormForward),
    FIELD(PoolForwardParams, shortcut),
    FIELD(PoolForwardParams, shortcut_kind),
    FIELD(PoolForwardParams, mask),
    FIELD(PoolForwardParams, pooled),
    FIELD(PoolForwardParams, batch),
    FIELD(PoolBackwardParams, dpooled),
    FIELD(PoolBackwardParams, mask),
    FIELD(PoolBackwardParams, y),
    FIELD(PoolBackwardParams, norm),
    FIELD(PoolBackwardParams, dz),
    FIELD(PoolBackwardParams, dz_sums),
    FIELD(PoolBackwardParams, batch),
    FIELD(LayerWeights, weight),
    FIELD(LayerWeights, forward),
    FIELD(LayerWeights, backward),
    FIELD(LayerWeights, bn_weight),
    FIELD(LayerWeights, bn_bias),
    FIELD(LayerWeights, running_mean),
    FIELD(LayerWeights, running_var),
    FIELD(LayerWeights, bias),
    FIELD(LayerWeights, eps),
    FIELD(LayerWeights, layout),
    FIELD(LayerWeights, C),
    FIELD(LayerWeights, K),
};

template <class Call>
int guarded(Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    failure = error.what();
    return kFailed;
  }
}

}  // namespace

extern "C" {

const Field* emulated_fields(int* count) {
  *count = sizeof kFields / sizeof kFields[0];
  return kFields;
}
const char* emulated_failure() {
  return failure.c_str();
}
void emulated_order(int order) {
  set_order(static_cast<Order>(order));
}
int emulated_last_overlapped() {
  return last_overlapped();
}
void emulated_allow(const void* start, size_t bytes, int writable) {
  allow(start, bytes, writable != 0);
}
void emulated_forbid_all() {
  forbid_all();
}

int emulated_conv3x3_forward(const ForwardParams* p, int dtype, int channels, int stride,
                             int blocks) {
  return guarded([&] {
    return conv3x3_forward(*p, static_cast<Dtype>(dtype), channels, stride, blocks, true, nullptr);
  });
}
int emulated_conv3x3_backward(const BackwardParams* p, int dtype, int channels, int stride,
                              int blocks) {
  return guarded([&] {
    return conv3x3_backward(*p, static_cast<Dtype>(dtype), channels, stride, blocks, true,
                            nullptr);
  });
}
int emulated_conv3x3_evaluate(const EvaluateParams* p, int dtype, int channels, int stride,
                              int blocks) {
  return guarded([&] {
    return conv3x3_evaluate(*p, static_cast<Dtype>(dtype), channels, stride, blocks, true,
                            nullptr);
  });
}
int emulated_conv3x3_backward_rows(int channels, int stride, int blocks, int batch) {
  return conv3x3_backward_rows(channels, stride, blocks, batch);
}
int emulated_stem_forward(const StemForwardParams* p, int dtype, int blocks) {
  return guarded(
      [&] { return stem_forward(*p, static_cast<Dtype>(dtype), blocks, true, nullptr); });
}
int emulated_stem_backward(const StemBackwardParams* p, int dtype, int blocks) {
  return guarded(
      [&] { return stem_backward(*p, static_cast<Dtype>(dtype), blocks, true, nullptr); });
}
int emulated_pool_forward(const PoolForwardParams* p, int dtype, int blocks) {
  return guarded(
      [&] { return pool_forward(*p, static_cast<Dtype>(dtype), blocks, true, nullptr); });
}
int emulated_pool_backward(const PoolBackwardParams* p, int dtype, int blocks) {
  return guarded(
      [&] { return pool_backward(*p, static_cast<Dtype>(dtype), blocks, true, nullptr); });
}
int emulated_sum_slabs(const SlabSum* slabs, int, int blocks) {
  return guarded([&] { return sum_slabs(*slabs, blocks, true, nullptr); });
}
int emulated_prepare_weights(const LayerWeights* layer, int dtype) {
  return guarded([&] { return prepare_weights(layer, 1, static_cast<Dtype>(dtype), nullptr); });
}
// sizes: N, H, W, C, K, stride and the elements of a chunk
int emulated_shortcut_a(const long long* sizes, int backward, int chunk_bytes, const void* from,
                        void* to) {
  return guarded([&] {
    const ShortcutA shape =
        make_shortcut_a(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]);
    return launch_shortcut_a({shape, from, to}, backward != 0, chunk_bytes, nullptr);
  });
}

}  // extern "C"
