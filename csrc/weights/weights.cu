// fp32 master weights to 16-bit fragments; weights.h has the order.
#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "common/shapes.cuh"
#include "common/warp.cuh"
#include "weights/weights.h"

namespace cifar_resnet_fast {
namespace {

constexpr int kThreads = 256;
// A thread makes at most one lane's 16 bytes of the largest layer, 64 by 64 in both directions:
// rounds would wait for memory one after the other. Blocks that a layer has no use for end at
// once.
constexpr int kBlocksPerLayer = 2 * 64 * 64 * 9 / 8 / kThreads;
constexpr int kArgumentBytes = 4096;  // of a kernel, on every driver

// What training needs of a layer, so small that those of ResNet-110 fit into one launch.
struct TrainedLayer {
  const float* weight;
  void* forward;
  void* backward;
  uint16_t C, K;
  WeightLayout layout;
};

template <bool FOLDS>
struct WeightParams {
  using Layer = std::conditional_t<FOLDS, LayerWeights, TrainedLayer>;
  static constexpr int kLayers = kArgumentBytes / sizeof(Layer);
  Layer layers[kLayers];
};

DEVICE LayerWeights whole(const LayerWeights& layer) {
  return layer;
}
DEVICE LayerWeights whole(const TrainedLayer& layer) {
  LayerWeights all = {};
  all.weight = layer.weight, all.forward = layer.forward, all.backward = layer.backward;
  all.C = layer.C, all.K = layer.K, all.layout = layer.layout;
  return all;
}

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
template <class T, bool FOLDS>
__global__ void __launch_bounds__(kThreads) prepare_weights_kernel(WeightParams<FOLDS> p) {
  const LayerWeights layer = whole(p.layers[block_index() / kBlocksPerLayer]);
  const bool stem = layer.C == 3, folds = FOLDS && layer.bn_weight != nullptr;
  // 16 bytes a direction, and both together
  const int chunks = stem ? 3 * 32 : layer.K * layer.C * 9 / 8;
  const int all = layer.backward == nullptr ? chunks : 2 * chunks;
  const int block = block_index() % kBlocksPerLayer;
  if (block * kThreads >= all) return;
  // the folded scales, in shared memory
  if (folds && thread_index() < layer.K) {
    const int k = thread_index();
    const float scale =
        load_float(layer.bn_weight + k) / sqrtf(load_float(layer.running_var + k) + layer.eps);
    store_shared(shared_start() + k * 4, scale);
    if (block == 0) {
      store_float(layer.bias + k, fused_multiply_add(-load_float(layer.running_mean + k), scale,
                                                     load_float(layer.bn_bias + k)));
    }
  }
  if (folds) block_barrier();  // the scales are there
  for (int chunk = block * kThreads + thread_index(); chunk < all;
       chunk += kBlocksPerLayer * kThreads) {
    const bool forward = chunk < chunks;
    const int i = forward ? chunk : chunk - chunks;
    const int taps = stem ? 3 : 9, steps = stem ? 1 : (forward ? layer.C : layer.K) / 16;
    const int lane = i % 32, s = i / 32 % steps, tap = i / 32 / steps % taps;
    const int h = i / 32 / steps / taps, g = lane >> 2, t = lane & 3;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int in = 16 * s + 2 * t + (j & 1) + 8 * (j >> 1 & 1);
      const int out = 16 * h + 4 * (g >> 1) + (g & 1) + 2 * (j >> 2);
      v[j] = stem      ? stem_weight(layer, tap, in, out)
             : forward ? weight_at(layer, out, in, tap)
                       : weight_at(layer, in, out, 8 - tap);
      if (folds && forward) v[j] *= load_shared_float(shared_start() + out * 4);
    }
    store_16_bytes(static_cast<char*>(forward ? layer.forward : layer.backward) + i * 16,
                   make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]),
                              T::pack(v[6], v[7])));
  }
}

template <bool FOLDS>
int launch_for(const WeightParams<FOLDS>& p, int count, Dtype dtype, void* stream) {
  const LaunchShape shape = {count * kBlocksPerLayer, kThreads, kThreads * 4, false, stream};
  return with_type(dtype, [&](auto type) {
    return launch(prepare_weights_kernel<decltype(type), FOLDS>, p, shape);
  });
}

TrainedLayer trained(const LayerWeights& layer) {
  return {layer.weight,
          layer.forward,
          layer.backward,
          static_cast<uint16_t>(layer.C),
          static_cast<uint16_t>(layer.K),
          layer.layout};
}

}  // namespace

int prepare_weights(const LayerWeights* layers, int count, Dtype dtype, void* stream) {
  const LayerWeights* const end = layers + count;
  const bool folds = std::any_of(
      layers, end, [](const LayerWeights& layer) { return layer.bn_weight != nullptr; });
  int status = 0, here = 0;
  for (; layers != end && status == 0; layers += here) {
    const int left = static_cast<int>(end - layers);
    if (folds) {
      WeightParams<true> p = {};
      here = std::min(left, p.kLayers);
      std::copy_n(layers, here, p.layers);
      status = launch_for(p, here, dtype, stream);
    } else {
      WeightParams<false> p = {};
      here = std::min(left, p.kLayers);
      std::transform(layers, layers + here, p.layers, trained);
      status = launch_for(p, here, dtype, stream);
    }
  }
  return status;
}

}  // namespace cifar_resnet_fast
