// The launcher of the option-A shortcut for ctypes, in the form of tests/emulation/bindings.cpp,
// which has those of the trunk.
#include "shortcut_a/shortcut_a.cuh"

using namespace cifar_resnet_fast;

namespace {

// N, H, W, C, K, stride and the elements of a chunk
ShortcutA shape_of(const long long* sizes) {
  return make_shortcut_a(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]);
}

}  // namespace

extern "C" {

int ptx_shortcut_a(const long long* sizes, int backward, int chunk_bytes, const void* from,
                   void* to) {
  return launch_shortcut_a(shape_of(sizes), backward != 0, chunk_bytes, from, to, nullptr);
}

}  // extern "C"
