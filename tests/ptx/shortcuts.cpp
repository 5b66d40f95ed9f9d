// The launchers of the option-A shortcut and of the stage border for ctypes, in the form of
// tests/emulation/bindings.cpp, which has those of the trunk.
#include "shortcut_a/shortcut_a.cuh"
#include "shortcut_a/stage_border.cuh"

using namespace cifar_resnet_fast;

namespace {

// N, H, W, C, K, stride and the elements of a unit
ShortcutA shape_of(const long long* sizes) {
  return make_shortcut_a(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]);
}

}  // namespace

extern "C" {

int ptx_shortcut_a(const long long* sizes, int backward, int unit_bytes, const void* from,
                   void* to) {
  return launch_shortcut_a(shape_of(sizes), backward != 0, unit_bytes, from, to, nullptr);
}

int ptx_stage_border_rows(const long long* sizes) {
  const BlockGrid grid = stage_border_grid(shape_of(sizes));
  return grid.images * grid.parts;
}

// tensors: y, scale, shift, x, out
int ptx_stage_border(const long long* sizes, int type, int unit_bytes, void* const* t) {
  const StageBorderForward p = {shape_of(sizes), t[0], t[1], t[2], t[3], t[4]};
  return launch_stage_border_forward(p, static_cast<ElementType>(type), unit_bytes, nullptr);
}

// tensors: dout, out, y, scale, dy, dscale, dshift, dx, partial_sums
int ptx_stage_border_backward(const long long* sizes, int type, int unit_bytes, void* const* t) {
  const StageBorderBackward p = {
      shape_of(sizes), t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
  return launch_stage_border_backward(p, static_cast<ElementType>(type), unit_bytes, nullptr);
}

}  // extern "C"
