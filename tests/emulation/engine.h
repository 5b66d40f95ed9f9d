// What runs the kernels in the tests, as bindings.cpp and operations.cpp see it: the emulator of
// this folder, or the interpreter of compiled code in tests/ptx.
#pragma once

#include <cstddef>

namespace cifar_resnet_fast {

// how warps take turns
enum class Order { kRoundRobin, kFirstWarpFirst, kLastWarpFirst };
void set_order(Order order);
// the tensors that the next launches may touch
void allow(const void* start, size_t bytes, bool writable);
void forbid_all();
// whether the last kernel was launched to start while the one before it ran
bool last_overlapped();

}  // namespace cifar_resnet_fast
