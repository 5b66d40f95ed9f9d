// Wgrad warps of the backward kernels. The roles and the barrier are described in
// backward_geometry.cuh.
//
// dweight[tap][c][k] is a product of matrices over pixels: a, shifted by the tap, transposed [c,
// pixel] by dy [pixel, k]; ldmatrix's transposed form reads both from rows of pixels. A warp has
// 16 input channels and one or two blocks of 16 output channels, for all taps.
#pragma once

#include "conv3x3/backward_geometry.cuh"

namespace cifar_resnet_fast {

template <class G>
struct Wgrad {
  using T = typename G::T;
  static constexpr int kColumns = G::kConfig.columns_per_warp;
  // 16 pixels of dy at a time; an image group's row has so many of them
  static constexpr int kPieces = G::kTiles;
  // With 16 channels the two pieces are those of the forward product (tile_pixel in
  // row_layout.cuh): four fragments of a, with shifts -1 .. 2, serve three taps of both, and
  // consecutive lanes read different banks. Otherwise a piece has a fragment for each kx.
  static constexpr bool kByShift = G::K == 16;
  static constexpr int kAddresses = kByShift ? 4 : 3;
  static constexpr int kFragments = kByShift ? 4 : 3 * kPieces;

  Tile sum[9][kColumns];
  uint32_t dy, a[kAddresses];  // the lane's addresses of the first piece, for a by shift or kx
  int c_16, first_k_16;        // which input, and first output, channels

  DEVICE Wgrad(const BackwardBlock& block, int index)
      : c_16(index % (G::kIn / 16)), first_k_16(index / (G::kIn / 16) * kColumns) {
    const int lane = thread_index() & 31, row = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
    // 16 pixels: of a row of one image, or 8 of two
    auto image = [](int half) { return G::K == 64 ? half : 0; };
    auto pixel = [&](int half) {
      return kByShift ? 4 * row + 2 * half : G::K == 64 ? row : row + 8 * half;
    };
    dy = block.start + G::kDyAt + G::DyRow::offset(image(low), pixel(low), high);
#pragma unroll
    for (int i = 0; i < kAddresses; ++i) {
      const int x = G::STRIDE * pixel(high) + i - 1;
      a[i] =
          G::ARow::channels_on(block.start + G::kAAt + G::ARow::offset(image(high), x, low), c_16);
    }
#pragma unroll
    for (int i = 0; i < 9 * kColumns; ++i) sum[i / kColumns][i % kColumns].clear();
  }
  // the piece after the one at an address
  DEVICE static uint32_t next_piece_of_dy(uint32_t address) {
    if constexpr (kByShift) {
      return address ^ 32;  // from an even pixel to the odd one
    } else {
      constexpr int kBytes = G::DyRow::kImageBytes * (G::K == 64 ? 2 : 1);
      return G::DyRow::template lines_on<kBytes / 128>(address);
    }
  }
  DEVICE static uint32_t next_piece_of_a(uint32_t address) {
    constexpr int kBytes = G::ARow::kImageBytes * (G::K == 64 ? 2 : 1);
    return G::ARow::template lines_on<kBytes / 128>(address);
  }

  struct DyRowFragments {
    uint32_t v[kPieces][kColumns][4];
    DEVICE void clear() {
#pragma unroll
      for (int i = 0; i < kPieces * kColumns * 4; ++i) {
        v[i / (kColumns * 4)][i / 4 % kColumns][i % 4] = 0;
      }
    }
  };
  DEVICE void load_dy(DyRowFragments& to, uint32_t row) const {
    uint32_t address = dy + row;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece > 0) address = next_piece_of_dy(address);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        load_matrices_transposed(to.v[piece][k], G::DyRow::channels_on(address, first_k_16 + k));
      }
    }
  }
  DEVICE void add(int tap, const uint32_t (&pixels)[4], const DyRowFragments& from, int piece) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const uint32_t (&b)[4] = from.v[piece][k];
      sum[tap][k].template add_product<T>(pixels, make_uint4(b[0], b[1], b[2], b[3]));
    }
  }

  // Stride 1: row y - 1 of a meets rows y, y - 1 and y - 2 of dy through ky = 0, 1 and 2, once row
  // y is there. The rows of dy rotate; those above and below an image are zeros.
  template <class Fetch>
  DEVICE void stream(int image_groups, Fetch fetch) {
    DyRowFragments rows[3];
    rows[0].clear(), rows[1].clear(), rows[2].clear();
    const int count = image_groups * (G::kSize + 1);
    int y = 0, a_row = G::kARing - 1;  // of row y - 1
    for (int first = 0; first < count; first += 3) {
#pragma unroll
      for (int turn = 0; turn < 3; ++turn) {
        if (first + turn < count) {
          if (y < G::kSize) {
            load_dy(rows[turn], fetch());
          } else {
            rows[turn].clear();
          }
          if (y > 0) {
            // pixels are loaded one fragment ahead of the products
            uint32_t pixels[2][4], address = 0;
            auto load = [&](int i) {
              if constexpr (kByShift) {
                address = a[i] + a_row * G::kARowBytes;
              } else {
                address = i % kPieces == 0 ? a[i / kPieces] + a_row * G::kARowBytes
                                           : next_piece_of_a(address);
              }
              load_matrices_transposed(pixels[i & 1], address);
            };
            load(0);
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
              if (i + 1 < kFragments) load(i + 1);
#pragma unroll
              for (int piece = 0; piece < kPieces; ++piece) {
                const int kx = kByShift ? i - piece : i / kPieces;
                if (kByShift ? kx < 0 || kx > 2 : piece != i % kPieces) continue;
#pragma unroll
                for (int ky = 0; ky < 3; ++ky) {
                  add(ky * 3 + kx, pixels[i & 1], rows[(turn + 3 - ky) % 3], piece);
                }
              }
            }
          }
          if (y < G::kSize) {
            a_row = a_row + 1 == G::kARing ? 0 : a_row + 1;
            ++y;
          } else {
            y = 0;
          }
        }
      }
    }
  }

  // Stride 2: row i of dy meets rows 2i - 1, 2i and 2i + 1 of a.
  template <class Fetch>
  DEVICE void stream_stride_2(int image_groups, Fetch fetch) {
    static_assert(kPieces == 1);
    DyRowFragments row;
    int a_row = 0;  // of row 2i
    for (int image_group = 0; image_group < image_groups; ++image_group) {
#pragma unroll 1
      for (int i = 0; i < G::kDySize; ++i) {
        load_dy(row, fetch());
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) {
          if (ky > 0 || i > 0) {
            const int ring_row = (a_row + ky - 1 + G::kARing) % G::kARing;
#pragma unroll
            for (int kx = 0; kx < 3; ++kx) {
              uint32_t pixels[4];
              load_matrices_transposed(pixels, a[kx] + ring_row * G::kARowBytes);
              add(ky * 3 + kx, pixels, row, 0);
            }
          }
        }
        a_row = (a_row + 2) % G::kARing;
      }
    }
  }

  // The warp's part of dweight, two neighbouring output channels at a time: put(element, values).
  template <class Put>
  DEVICE void each_pair(int first_c, Put put) const {
    const int lane = thread_index() & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i % 2, eight = i / 2;
          const int c = first_c + c_16 * 16 + g + 8 * half;
          const int column = (first_k_16 + k) * 16 + eight * 8 + 2 * t;
          put((tap * G::C + c) * G::K + column, sum[tap][k].v[eight][2 * half],
              sum[tap][k].v[eight][2 * half + 1]);
        }
      }
    }
  }
};

template <class G>
DEVICE void wgrad(const BackwardParams& p, const BackwardBlock& block, int index) {
  wait_for_kernel_before();
  begin_gradient<G>(p, block, G::kDgradWarps + index);
  DyRing<G> dy(block);
  auto fetch = [&] { return dy.next(); };
  Wgrad<G> gradient(block, index);
  const int image_groups = block.image_groups.count();
  if constexpr (G::STRIDE == 1) {
    gradient.stream(image_groups, fetch);
  } else {
    gradient.stream_stride_2(image_groups, fetch);
  }
  if (G::kStaged) step_barrier<G>(block);  // the last rows are staged
  if (G::kGroups == 1 && image_groups > 0) {
    // while the producers finish the last rows
    float* slab = p.slabs + static_cast<long long>(block.row) * G::kSlabElements;
    gradient.each_pair(block.split * G::kIn, [&](int element, float first, float second) {
      store_8_bytes(slab + element, make_uint2(as_bits(first), as_bits(second)));
    });
  }
  // several groups add to dweight in shared memory one after the other, so in a fixed order
  end_backward<G>([] {},
                  [&](int turn) {
                    if (turn == block.group) {
                      gradient.each_pair(0, [&](int element, float first, float second) {
                        const uint32_t to = shared_start() + G::kGroupsAt + element * 4;
                        if (turn > 0) {
                          const uint2 old = load_shared_8_bytes(to);
                          first += as_float(old.x), second += as_float(old.y);
                        }
                        store_shared(to, make_uint2(as_bits(first), as_bits(second)));
                      });
                    }
                  });
}

}  // namespace cifar_resnet_fast
