// CUDA kernels of relu(scale * y + shift + shortcut_a(x)), forward and backward; parameters and
// arithmetic are in stage_border.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "shortcut_a/stage_border.cuh"

namespace cifar_resnet_fast {
namespace {

constexpr uint32_t THREADS = 256;

// The dtype of scale, shift and all arithmetic.
template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V elements that are loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Chunk {
  T element[V];
};

template <typename Real, typename T>
__device__ Real to_real(T value) {
  // by name: torch builds without the 16-bit types' conversion operators
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename T, typename Real>
__device__ T round_to(Real value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// V values of a [K] vector, by 16-byte loads where V is more than one (16-byte aligned then).
template <int V, typename Real>
__device__ void load_vector(const Real* vector, Real (&value)[V]) {
  constexpr int WIDTH = V == 1 ? 1 : 16 / sizeof(Real);
#pragma unroll
  for (int i = 0; i < V; i += WIDTH) {
    const auto loaded = *reinterpret_cast<const Chunk<Real, WIDTH>*>(vector + i);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) value[i + j] = loaded.element[j];
  }
}

// out = relu(scale * y + shift + shortcut). A thread owns a chunk of out; grid x: chunks of an
// image, grid y: images.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) stage_border_forward_kernel(StageBorderForward p) {
  using Real = RealOf<T>;
  using Chunk = Chunk<T, V>;
  const ShortcutA& shape = p.shape;
  const uint32_t u = blockIdx.x * THREADS + threadIdx.x;
  if (u >= shape.out_chunks()) return;
  const uint32_t channel = u - shape.by_out_channels.quotient(u) * shape.out_channels;
  const uint32_t source = chunk_in_x(shape, u);
  Real scale[V], shift[V];
  load_vector<V>(static_cast<const Real*>(p.scale) + channel * V, scale);
  load_vector<V>(static_cast<const Real*>(p.shift) + channel * V, shift);
  for (int64_t n = blockIdx.y; n < shape.N; n += gridDim.y) {
    const Chunk y = static_cast<const Chunk*>(p.y)[n * shape.out_chunks() + u];
    Chunk shortcut{};
    if (source != NOWHERE)
      shortcut = static_cast<const Chunk*>(p.x)[n * shape.x_chunks() + source];
    Chunk out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.element[i] = round_to<T>(stage_border_value(
          scale[i], to_real<Real>(y.element[i]), shift[i], to_real<Real>(shortcut.element[i])));
    }
    static_cast<Chunk*>(p.out)[n * shape.out_chunks() + u] = out;
  }
}

// A group of up to 32 chunks of channels side by side; the block's threads stand in rows of one
// group, a row a pixel.
constexpr uint32_t MAX_GROUP = 32;

// dz = dout where out > 0; dy = scale * dz; dx gathers dz; the block's sums of dz * y and dz go to
// its row of partial_sums. A block owns one part of the pixels of some images.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 4) stage_border_backward_kernel(StageBorderBackward p) {
  using Real = RealOf<T>;
  using Chunk = Chunk<T, V>;
  const ShortcutA& shape = p.shape;
  const auto* dout = static_cast<const Chunk*>(p.dout);
  const auto* out = static_cast<const Chunk*>(p.out);
  const auto* y = static_cast<const Chunk*>(p.y);
  auto* dy = static_cast<Chunk*>(p.dy);
  auto* dx = static_cast<Chunk*>(p.dx);

  const uint32_t group = min(shape.out_channels, MAX_GROUP), rows = THREADS / group;
  const uint32_t lane = threadIdx.x % group, row = threadIdx.x / group;
  const uint32_t K = shape.out_channels * V;
  Real* block_sums =
      static_cast<Real*>(p.partial_sums) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * 2 * K;
  __shared__ Real sums[2][V][THREADS];

  // 1. dy and the sums. A thread keeps its channels and walks over pixels.
  for (uint32_t first = 0; first < shape.out_channels; first += group) {
    const uint32_t channel = first + lane;
    // threads that the last row or the last group leaves over have no pixels, but meet the
    // barriers
    const bool working = row < rows && channel < shape.out_channels;
    Real scale[V] = {}, sum_dz_y[V] = {}, sum_dz[V] = {};
    if (working) load_vector<V>(static_cast<const Real*>(p.scale) + channel * V, scale);
    for (int64_t n = blockIdx.x; working && n < shape.N; n += gridDim.x) {
      const int64_t image = n * shape.out_chunks();
      for (uint32_t pixel = blockIdx.y * rows + row; pixel < shape.out_pixels;
           pixel += gridDim.y * rows) {
        const int64_t u = image + pixel * shape.out_channels + channel;
        const Chunk dout_u = dout[u], out_u = out[u], y_u = y[u];
        Chunk dy_u;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Real dz =
              stage_border_dz(to_real<Real>(dout_u.element[i]), to_real<Real>(out_u.element[i]));
          dy_u.element[i] = round_to<T>(scale[i] * dz);
          sum_dz_y[i] += dz * to_real<Real>(y_u.element[i]);
          sum_dz[i] += dz;
        }
        dy[u] = dy_u;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i][threadIdx.x] = sum_dz_y[i];
      sums[1][i][threadIdx.x] = sum_dz[i];
    }
    __syncthreads();  // every row's sums are there before they are added, in the order of the rows
    const uint32_t channels = min(group, shape.out_channels - first) * V;
    for (uint32_t column = threadIdx.x; column < 2 * channels; column += THREADS) {
      const uint32_t which = column / channels, c = column % channels;
      Real sum = 0;
      for (uint32_t r = 0; r < rows; ++r) sum += sums[which][c % V][r * group + c / V];
      block_sums[which * K + first * V + c] = sum;
    }
    __syncthreads();  // they have been read before the next group overwrites them
  }

  // 2. dx, from the dout and out that part 1 has just brought into the cache.
  for (int64_t n = blockIdx.x; n < shape.N; n += gridDim.x) {
    for (uint32_t u = blockIdx.y * THREADS + threadIdx.x; u < shape.x_chunks();
         u += gridDim.y * THREADS) {
      const uint32_t source = chunk_in_out(shape, u);
      Chunk dx_u{};
      if (source != NOWHERE) {
        const int64_t s = n * shape.out_chunks() + source;
        const Chunk dout_s = dout[s], out_s = out[s];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          dx_u.element[i] = round_to<T>(
              stage_border_dz(to_real<Real>(dout_s.element[i]), to_real<Real>(out_s.element[i])));
        }
      }
      dx[n * shape.x_chunks() + u] = dx_u;
    }
  }
}

constexpr uint32_t COLUMNS = 32, STRIPES = 8;

// dscale and dshift: the columns of partial_sums [rows, 2, K], added in a fixed order in float64.
// A block owns COLUMNS columns; its STRIPES rows of threads each add every STRIPES-th row.
template <typename Real>
__global__ void __launch_bounds__(COLUMNS* STRIPES)
    stage_border_sums_kernel(const Real* __restrict__ partial_sums, uint32_t rows, uint32_t K,
                             Real* __restrict__ dscale, Real* __restrict__ dshift) {
  const uint32_t column = blockIdx.x * COLUMNS + threadIdx.x;
  __shared__ double stripes[STRIPES][COLUMNS];
  double sum = 0;
  if (column < 2 * K) {
    for (uint32_t row = threadIdx.y; row < rows; row += STRIPES) {
      sum += partial_sums[int64_t{row} * 2 * K + column];
    }
  }
  stripes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // all stripes are there before the first row of threads adds them
  if (threadIdx.y == 0 && column < 2 * K) {
    for (uint32_t i = 1; i < STRIPES; ++i) sum += stripes[i][threadIdx.x];
    (column < K ? dscale[column] : dshift[column - K]) = static_cast<Real>(sum);
  }
}

template <typename T, int V>
int launch(const StageBorderForward& p, cudaStream_t stream) {
  const dim3 grid((p.shape.out_chunks() + THREADS - 1) / THREADS,
                  static_cast<unsigned>(std::min<int64_t>(p.shape.N, 65535)));
  stage_border_forward_kernel<T, V><<<grid, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int V>
int launch(const StageBorderBackward& p, cudaStream_t stream) {
  using Real = RealOf<T>;
  const BlockGrid grid = stage_border_grid(p.shape);
  stage_border_backward_kernel<T, V><<<dim3(grid.images, grid.parts), THREADS, 0, stream>>>(p);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  const uint32_t K = p.shape.out_channels * V;
  stage_border_sums_kernel<Real>
      <<<(2 * K + COLUMNS - 1) / COLUMNS, dim3(COLUMNS, STRIPES), 0, stream>>>(
          static_cast<const Real*>(p.partial_sums), grid.images * grid.parts, K,
          static_cast<Real*>(p.dscale), static_cast<Real*>(p.dshift));
  return cudaGetLastError();
}

template <typename T, typename Params>
int launch(const Params& p, size_t chunk_bytes, void* stream) {
  constexpr int WIDE = 16 / sizeof(T);
  const auto s = static_cast<cudaStream_t>(stream);
  return chunk_bytes == 16 ? launch<T, WIDE>(p, s) : launch<T, 1>(p, s);
}

template <typename Params>
int launch(const Params& p, ElementType type, size_t chunk_bytes, void* stream) {
  switch (type) {
    case ElementType::float16:
      return launch<__half>(p, chunk_bytes, stream);
    case ElementType::bfloat16:
      return launch<__nv_bfloat16>(p, chunk_bytes, stream);
    case ElementType::float32:
      return launch<float>(p, chunk_bytes, stream);
    case ElementType::float64:
      return launch<double>(p, chunk_bytes, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

BlockGrid stage_border_grid(const ShortcutA& shape) {
  const uint32_t rows = THREADS / std::min(shape.out_channels, MAX_GROUP);
  const uint32_t parts = (shape.out_pixels + rows - 1) / rows;
  return {static_cast<uint32_t>(std::min<int64_t>(shape.N, 256)), std::min(parts, 4u)};
}

int launch_stage_border_forward(const StageBorderForward& p, ElementType type, size_t chunk_bytes,
                                void* stream) {
  return launch(p, type, chunk_bytes, stream);
}

int launch_stage_border_backward(const StageBorderBackward& p, ElementType type,
                                 size_t chunk_bytes, void* stream) {
  return launch(p, type, chunk_bytes, stream);
}

}  // namespace cifar_resnet_fast
