// Small kernels with one mistake each, which the emulator has to find; tests/test_emulator.py.
#include <string>

#include "emulator.h"

using namespace cifar_resnet_fast;

namespace {

struct Params {
  const float* from;  // [64]
  float* to;          // [64]
};
constexpr int kThreads = 64;

int lane() {
  return thread_index() & 31;
}
uint32_t place(int thread) {
  return thread * 16;
}
// of another lane of the warp, and of the other warp
int neighbour() {
  return thread_index() ^ 1;
}
int opposite() {
  return thread_index() ^ 32;
}

// what the others do wrong, right
void none(Params p) {
  const uint4 constant = load_16_bytes_constant(p.from + (lane() & 3) * 4);
  wait_for_kernel_before();
  copy_16_bytes_async(place(thread_index()), p.from);
  commit_copies();
  wait_for_copies<0>();
  warp_barrier();
  float sum = load_shared_float(place(neighbour())) + as_float(constant.x);
  uint32_t matrices[4];
  load_matrices(matrices, place(thread_index()));
  group_barrier<2>(1);
  store_shared(place(thread_index()), sum);
  block_barrier();
  sum += load_shared_float(place(opposite()));
  if (block_index() == 0) store_float(p.to + thread_index(), sum + load_float(p.to));
}

void written_in_the_warp(Params) {
  wait_for_kernel_before();
  store_shared(place(thread_index()), 1.0f);
  shuffle_xor(1.0f, 1);  // orders nothing
  load_shared_float(place(neighbour()));
}
void read_in_the_warp(Params) {
  wait_for_kernel_before();
  store_shared(place(thread_index()), 1.0f);
  warp_barrier();
  load_shared_float(place(neighbour()));
  shuffle_xor(1.0f, 1);
  store_shared(place(thread_index()), 2.0f);
}
void matrices_in_the_warp(Params) {
  wait_for_kernel_before();
  store_shared(place(neighbour()), make_uint4(0, 0, 0, 0));
  uint32_t matrices[4];
  load_matrices(matrices, place(thread_index()));
}
void written_by_another_warp(Params) {
  wait_for_kernel_before();
  store_shared(place(thread_index()), 1.0f);
  warp_barrier();
  if (thread_index() >= 32) load_shared_float(place(opposite()));
}
void read_by_another_warp(Params) {
  wait_for_kernel_before();
  store_shared(place(thread_index()), 1.0f);
  block_barrier();
  if (thread_index() >= 32) load_shared_float(place(opposite()));
  warp_barrier();
  if (thread_index() < 32) store_shared(place(thread_index()), 2.0f);
}
void copy_not_waited_for(Params p) {
  wait_for_kernel_before();
  copy_16_bytes_async(place(thread_index()), p.from);
  commit_copies();
  load_shared_float(place(thread_index()));
}
void written_by_two_blocks(Params p) {
  wait_for_kernel_before();
  store_float(p.to + thread_index(), 1.0f);
}
void read_by_another_block(Params p) {
  wait_for_kernel_before();
  if (block_index() == 0) {
    load_float(p.to + thread_index());
  } else {
    store_float(p.to + thread_index(), 1.0f);
  }
}
void read_before_the_wait(Params p) {
  load_float(p.from);
  wait_for_kernel_before();
}
void written_before_the_wait(Params p) {
  if (block_index() == 0) store_float(p.to + thread_index(), 1.0f);
  wait_for_kernel_before();
}
void never_waits(Params) {}
void constant_that_is_written(Params p) {
  load_16_bytes_constant(p.to);
  wait_for_kernel_before();
}
void different_instructions(Params) {
  wait_for_kernel_before();
  if (lane() < 16) {
    shuffle_xor(1.0f, 1);
  } else {
    warp_barrier();
  }
}
void part_of_a_warp(Params) {
  wait_for_kernel_before();
  if (lane() < 16) group_barrier<1>(1);
}

struct Fault {
  const char* name;
  void (*kernel)(Params);
};
#define FAULT(kernel) {#kernel, kernel}
const Fault kFaults[] = {
    FAULT(none),
    FAULT(written_in_the_warp),
    FAULT(read_in_the_warp),
    FAULT(matrices_in_the_warp),
    FAULT(written_by_another_warp),
    FAULT(read_by_another_warp),
    FAULT(copy_not_waited_for),
    FAULT(written_by_two_blocks),
    FAULT(read_by_another_block),
    FAULT(read_before_the_wait),
    FAULT(written_before_the_wait),
    FAULT(never_waits),
    FAULT(constant_that_is_written),
    FAULT(different_instructions),
    FAULT(part_of_a_warp),
};

}  // namespace

// What the emulator says of the kernel of that name; empty: nothing.
extern "C" const char* run_fault(const char* name) {
  alignas(16) static float from[kThreads], to[kThreads];
  static std::string found;
  found = "no such fault";
  for (const Fault& fault : kFaults) {
    if (std::string(name) != fault.name) continue;
    found.clear();
    forbid_all();
    allow(from, sizeof from, false);
    allow(to, sizeof to, true);
    try {
      launch(fault.kernel, Params{from, to}, {2, kThreads, kThreads * 16, true, nullptr});
    } catch (const std::exception& error) {
      found = error.what();
    }
  }
  return found.c_str();
}
