// Convolutions of evaluation; conv3x3.h says what they compute.
//
// Image groups, groups and convolution warps are those of forward.cuh. Nothing is normalised on
// load, so the producers copy finished rows straight into a ring of haloed rows, several steps
// ahead. At barrier k the rows of step k are there, and those of step k - 1 have been read: their
// place is filled next.
#include "common/launch.cuh"
#include "common/shapes.cuh"
#include "conv3x3/forward.cuh"

namespace cifar_resnet_fast {

template <int C_, int STRIDE_>
struct EvaluateGeometry {
  static constexpr int C = C_, STRIDE = STRIDE_, K = C * STRIDE;
  static constexpr ForwardConfig kConfig = forward_config<C, STRIDE>();
  using Row = HaloRow<C, Stage<C>::kSize>;
  using Out = Stage<K>;
  static constexpr int kImages = kConfig.images;
  static constexpr int kConvolvers = K / 16, kGroupWarps = kConvolvers + kConfig.producers;
  static constexpr int kThreads = kGroupWarps * kConfig.groups * 32;
  static constexpr int kChunks = kImages * kRowChunks / (kConfig.producers * 32);
  static constexpr int kRing = 4;  // steps of STRIDE rows
  static constexpr int kRowBytesHaloed = kImages * Row::kImageBytes;
  static constexpr int kStepBytes = STRIDE * kRowBytesHaloed;
  static constexpr int kGroupBytes = kRing * kStepBytes;
  static constexpr int kSharedBytes = kConfig.groups * kGroupBytes;
  static constexpr int kTiles = K == 16 ? 2 : kImages / Out::kImagesPerTile;
  static constexpr int kImageGroupSteps = Out::kSize;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

namespace {

template <class G>
DEVICE void copy_rows(const EvaluateParams& p, const Share& image_groups, int group, int index,
                      uint32_t halo) {
  const int position = index * 32 + (thread_index() & 31);
  int load_group = image_groups.first, load_y = 0, slot = 0;
  auto load_step = [&] {
    if (load_group < image_groups.end) {
#pragma unroll
      for (int j = 0; j < G::kChunks; ++j) {
        const int chunk = j * G::kConfig.producers * 32 + position, image = chunk / kRowChunks;
        const bool present = load_group * G::kImages + image < p.batch;
        const uint32_t to =
            halo + slot * G::kStepBytes +
            G::Row::offset(image, chunk % kRowChunks / (G::C / 8), position % (G::C / 8));
        const char* from = static_cast<const char*>(p.x) +
                           (load_group * G::kImages + image) * Stage<G::C>::kImageBytes +
                           load_y * G::STRIDE * kRowBytes + chunk % kRowChunks * 16;
#pragma unroll
        for (int r = 0; r < G::STRIDE; ++r) {
          copy_16_bytes_async(to + r * G::kRowBytesHaloed, from + r * kRowBytes, present);
        }
      }
      if (++load_y == G::kImageGroupSteps) load_y = 0, ++load_group;
    }
    commit_copies();
    slot = (slot + 1) % G::kRing;
  };
  for (int i = 0; i < G::kRing - 1; ++i) load_step();
  const int steps = (image_groups.end - image_groups.first) * G::kImageGroupSteps;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<G::kRing - 2>();
    group_barrier<G::kGroupWarps>(group + 1);  // this step's rows are there
    load_step();
  }
}

// Finishes rows in their order: bias, shortcut, ReLU. The shortcut of a row is loaded a row ahead.
template <class T, class G>
struct FinishedRows {
  static constexpr int kHalves = G::kTiles * 2;
  const EvaluateParams& p;
  int place[kHalves], shortcut_place[kHalves], image[kHalves];
  float bias[4];
  bool adds, option_a;
  uint2 shortcut[kHalves];
  int image_group, end, y = 0;

  DEVICE FinishedRows(const EvaluateParams& params, const Share& image_groups, int index)
      : p(params), image_group(image_groups.first), end(image_groups.end) {
    const int lane = thread_index() & 31, channel = index * 16 + (lane & 3) * 4;
    option_a = G::K > 16 && p.shortcut_kind == Shortcut::kOptionA;
    const int old = channel - G::K / 4;  // option A: of the stage before
    adds = p.shortcut_kind != Shortcut::kNone && (!option_a || (old >= 0 && old < G::K / 2));
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int x = tile_pixel<G::K>(i / 2, i % 2, lane);
      image[i] = G::K == 16 ? 0 : G::K == 32 ? i / 2 : i;
      place[i] = image[i] * G::Out::kImageBytes + (x * G::K + channel) * 2;
      shortcut_place[i] = option_a
                              ? image[i] * 2 * G::Out::kImageBytes + (2 * x * (G::K / 2) + old) * 2
                              : place[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = load_float(p.bias + channel + i);
    load_shortcut();
  }
  DEVICE bool present(int i) const { return image_group * G::kImages + image[i] < p.batch; }
  DEVICE int row() const { return image_group * G::kImages * G::Out::kImageBytes + y * kRowBytes; }
  DEVICE void load_shortcut() {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const char* from = static_cast<const char*>(p.shortcut) + (option_a ? 2 * row() : row());
      shortcut[i] = adds && image_group < end && present(i)
                        ? load_8_bytes(from + shortcut_place[i])
                        : make_uint2(0, 0);
    }
  }
  DEVICE void write(const Tile (&tiles)[G::kTiles]) {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      write_half_tile<T>(tiles[i / 2], i % 2, static_cast<char*>(p.out) + row() + place[i],
                         present(i), bias, shortcut[i]);
    }
    if (++y == G::Out::kSize) y = 0, ++image_group;
    load_shortcut();
  }
};

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 1) conv3x3_evaluate_kernel(EvaluateParams p) {
  constexpr int kConvolvers = G::kConfig.groups * G::kConvolvers;
  const int warp = thread_index() >> 5;
  const bool produces = warp >= kConvolvers;
  const int role_warps = produces ? G::kConfig.producers : G::kConvolvers;
  const int warp_of_role = produces ? warp - kConvolvers : warp;
  const int group = warp_of_role / role_warps, index = warp_of_role % role_warps;
  const uint32_t halo = shared_start() + group * G::kGroupBytes;
  const Share image_groups((p.batch + G::kImages - 1) / G::kImages,
                           block_index() * G::kConfig.groups + group,
                           block_count() * G::kConfig.groups);
  let_next_kernel_start();
  for (int i = thread_index() * 16; i < G::kSharedBytes; i += G::kThreads * 16) {
    store_shared(shared_start() + i, make_uint4(0, 0, 0, 0));
  }
  block_barrier();  // the pixels beside the images are zeros
  if (produces) {
    wait_for_kernel_before();
    copy_rows<G>(p, image_groups, group, index, halo);
    return;
  }
  WeightFragments<G::C / 16> weights;
  weights.load(p.fragments, index);
  wait_for_kernel_before();
  FinishedRows<T, G> out(p, image_groups, index);
  uint32_t step = 0;
  auto fetch = [&]() -> uint32_t {
    group_barrier<G::kGroupWarps>(group + 1);  // this step's rows are there
    const uint32_t rows = step;
    step = step + G::kStepBytes == G::kGroupBytes ? 0 : step + G::kStepBytes;
    return rows;
  };
  if constexpr (G::STRIDE == 1) {
    const FragmentAddresses<G::C> fragments(halo, 0);
    RowConvolution<T, G::C, G::kTiles> convolution;
    auto finish = [&](const Tile(&tiles)[G::kTiles], bool done) {
      if (done) out.write(tiles);
    };
    convolution.template stream<Stage<G::C>::kSize>(image_groups.end - image_groups.first,
                                                    fragments, weights, fetch, finish);
  } else {
    static_assert(G::kTiles == 1);
    const StridedConvolution<T, G::C> convolution(halo);
    Tile here[1], below;
    for (int image_group = image_groups.first; image_group < image_groups.end; ++image_group) {
      here[0].clear();
#pragma unroll 1
      for (int y = 0; y < G::kImageGroupSteps; ++y) {
        const uint32_t rows = fetch();
        below.clear();
        convolution.multiply(here[0], below, rows, rows + G::kRowBytesHaloed, weights);
        out.write(here);
        here[0] = below;
      }
    }
  }
}

}  // namespace

int conv3x3_evaluate(const EvaluateParams& p, Dtype dtype, int channels, int stride, int blocks,
                     bool overlap, void* stream) {
  return with_shape(channels, stride, [&](auto shape) {
    return with_type(dtype, [&](auto type) {
      using G = EvaluateGeometry<shape.kChannels, shape.kStride>;
      return launch(conv3x3_evaluate_kernel<decltype(type), G>, p,
                    {blocks, G::kThreads, G::kSharedBytes, overlap, stream});
    });
  });
}

}  // namespace cifar_resnet_fast
