// fp32 master weights to 16-bit fragments; weights.h has the order.
#include <algorithm>

#include "launch.cuh"
#include "warp.cuh"
#include "weights.h"

namespace cifar_resnet_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerLayer = 8;
constexpr int kLayersPerLaunch = 48;

struct WeightParams {
  LayerWeights layers[kLayersPerLaunch];
};
static_assert(sizeof(WeightParams) <= 4096);  // of a kernel's arguments, on every driver

DEVICE float weight_at(const LayerWeights& layer, int k, int c, int tap) {
  const int place = layer.layout == WeightLayout::kContiguous ? c * 9 + tap : tap * layer.C + c;
  return load_float(layer.weight + k * 9 * layer.C + place);
}

// weight of input channel `in`, output channel `out`, 0 where there is none
DEVICE float stem_weight(const LayerWeights& layer, int ky, int in, int out) {
  const int kx = in / 4, c = in % 4;
  return kx < 3 && c < 3 ? weight_at(layer, out, c, ky * 3 + kx) : 0.0f;
}

// A thread makes a lane's 16 bytes of a fragment at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_weights_kernel(WeightParams p) {
  const LayerWeights layer = p.layers[block_index() / kBlocksPerLayer];
  const bool stem = layer.C == 3, folds = layer.bn_weight != nullptr;
  // the folded scales, in shared memory
  if (folds && thread_index() < layer.K) {
    const int k = thread_index();
    const float scale =
        load_float(layer.bn_weight + k) / sqrtf(load_float(layer.running_var + k) + layer.eps);
    store_shared(shared_start() + k * 4, scale);
    if (block_index() % kBlocksPerLayer == 0) {
      store_float(layer.bias + k, fused_multiply_add(-load_float(layer.running_mean + k), scale,
                                                     load_float(layer.bn_bias + k)));
    }
  }
  block_barrier();  // the scales are there
  const int first = block_index() % kBlocksPerLayer * kThreads + thread_index();
  for (int direction = 0; direction < 2; ++direction) {
    void* to = direction == 0 ? layer.forward : layer.backward;
    if (to == nullptr) continue;
    const int taps = stem ? 3 : 9, ins = stem ? 16 : direction == 0 ? layer.C : layer.K;
    const int outs = direction == 0 ? layer.K : layer.C, steps = ins / 16;
    for (int i = first; i < outs / 16 * taps * steps * 32; i += kBlocksPerLayer * kThreads) {
      const int lane = i % 32, s = i / 32 % steps, tap = i / 32 / steps % taps;
      const int h = i / 32 / steps / taps, g = lane >> 2, t = lane & 3;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int in = 16 * s + 2 * t + (j & 1) + 8 * (j >> 1 & 1);
        const int out = 16 * h + 4 * (g >> 1) + (g & 1) + 2 * (j >> 2);
        v[j] = stem             ? stem_weight(layer, tap, in, out)
               : direction == 0 ? weight_at(layer, out, in, tap)
                                : weight_at(layer, in, out, 8 - tap);
        if (folds && direction == 0) v[j] *= load_shared_float(shared_start() + out * 4);
      }
      store_16_bytes(static_cast<char*>(to) + i * 16,
                     make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]),
                                T::pack(v[6], v[7])));
    }
  }
}

}  // namespace

int prepare_weights(const LayerWeights* layers, int count, Dtype dtype, void* stream) {
  if (layers == nullptr) return kBadPointer;
  for (int first = 0; first < count; first += kLayersPerLaunch) {
    WeightParams p = {};
    const int here = std::min(count - first, kLayersPerLaunch);
    std::copy_n(layers + first, here, p.layers);
    const LaunchShape shape = {here * kBlocksPerLayer, kThreads, kThreads * 4, false, stream};
    const int status = dtype == Dtype::kFloat16
                           ? launch(prepare_weights_kernel<Float16>, p, shape)
                           : launch(prepare_weights_kernel<BFloat16>, p, shape);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace cifar_resnet_fast
