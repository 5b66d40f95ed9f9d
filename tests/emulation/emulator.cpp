// Fibers, barriers and checked memory of the emulated device; see emulator.h.
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cifar_resnet_fast {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in fp16, bf16 and fp32

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  bool valid;
};

struct Lane {
  ucontext_t start;
  jmp_buf here;
  bool started = false;
  bool done = false;
  int thread;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Barrier {
  int expected = 0;
  std::vector<Lane*> waiting;
};

struct Warp {
  int arrived = 0;
  Operands* operands[32];
  std::vector<Lane*> waiting;
};

struct Range {
  const char* start;
  size_t bytes;
  bool writable;
};

Order order = Order::kRoundRobin;
std::vector<Range> ranges;
size_t last_range = 0;

// the block that runs
std::vector<Lane> lanes;
std::vector<Warp> warps;
std::map<int, Barrier> barriers;
std::vector<std::deque<Lane*>> ready;  // one queue a warp
std::vector<unsigned char> shared;
const std::function<void()>* kernel;
Lane* current;
int block, blocks, last_warp;
jmp_buf scheduler;
std::exception_ptr failure;

std::string where() {
  return " (block " + std::to_string(block) + ", warp " + std::to_string(current->thread / 32) +
         ", lane " + std::to_string(current->thread % 32) + ")";
}

void make_ready(Lane* lane) {
  ready[lane->thread / 32].push_back(lane);
}

void stop_until_ready() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

// throws nothing past the fiber's own stack
void run_lane() {
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
  current->done = true;
  _longjmp(scheduler, 1);
}

Lane* next_lane() {
  const int count = static_cast<int>(ready.size());
  for (int i = 0; i < count; ++i) {
    const int warp = order == Order::kFirstWarpFirst  ? i
                     : order == Order::kLastWarpFirst ? count - 1 - i
                                                      : (last_warp + 1 + i) % count;
    if (ready[warp].empty()) continue;
    Lane* lane = ready[warp].front();
    ready[warp].pop_front();
    last_warp = warp;
    return lane;
  }
  return nullptr;
}

void run_block(int threads) {
  volatile int left = threads;
  while (left > 0) {
    Lane* volatile lane = next_lane();
    if (lane == nullptr) throw std::runtime_error("deadlock: every lane waits at a barrier");
    current = lane;
    if (_setjmp(scheduler) == 0) {
      if (lane->started) _longjmp(lane->here, 1);
      lane->started = true;
      setcontext(&lane->start);
    }
    if (failure) std::rethrow_exception(failure);
    if (lane->done) {
      left = left - 1;
      if (!lane->groups.empty() || !lane->uncommitted.empty()) {
        for (const auto& group : lane->groups) {
          if (!group.empty()) throw std::runtime_error("a copy was never waited for" + where());
        }
        if (!lane->uncommitted.empty()) throw std::runtime_error("an uncommitted copy" + where());
      }
    }
  }
}

}  // namespace

void set_order(Order new_order) {
  order = new_order;
}

void allow(const void* start, size_t bytes, bool writable) {
  ranges.push_back({static_cast<const char*>(start), bytes, writable});
}

void forbid_all() {
  ranges.clear();
}

int thread_index() {
  return current->thread;
}
int block_index() {
  return block;
}
int block_count() {
  return blocks;
}

void* checked_global(const void* p, size_t bytes, bool write) {
  const char* first = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    throw std::runtime_error("misaligned access to global memory" + where());
  }
  for (size_t i = 0; i < ranges.size(); ++i) {
    const Range& range = ranges[(last_range + i) % ranges.size()];
    if (first >= range.start && first + bytes <= range.start + range.bytes &&
        (range.writable || !write)) {
      last_range = (last_range + i) % ranges.size();
      return const_cast<char*>(first);
    }
  }
  throw std::runtime_error(std::string(write ? "write" : "read") + " outside every tensor" +
                           where());
}

unsigned char* checked_shared(uint32_t address, size_t bytes) {
  if (address + bytes > shared.size() || address % bytes != 0) {
    throw std::runtime_error("shared address " + std::to_string(address) + " of " +
                             std::to_string(shared.size()) + where());
  }
  return shared.data() + address;
}

void barrier(int id, int expected) {
  Barrier& b = barriers[id];
  if (b.waiting.empty()) b.expected = expected;
  if (b.expected != expected || id > 15) {
    throw std::runtime_error("barrier " + std::to_string(id) + " with two numbers of lanes" +
                             where());
  }
  if (static_cast<int>(b.waiting.size()) + 1 < expected) {
    b.waiting.push_back(current);
    stop_until_ready();
    return;
  }
  std::vector<Lane*> waiting;
  waiting.swap(b.waiting);
  for (Lane* lane : waiting) make_ready(lane);
  make_ready(current);
  stop_until_ready();
}

void block_barrier() {
  barrier(0, static_cast<int>(lanes.size()));
}

void with_whole_warp(Operands& mine, void (*act)(Operands* const*)) {
  Warp& warp = warps[current->thread / 32];
  warp.operands[current->thread % 32] = &mine;
  if (++warp.arrived < 32) {
    warp.waiting.push_back(current);
    stop_until_ready();
    return;
  }
  warp.arrived = 0;
  act(warp.operands);
  for (Lane* lane : warp.waiting) make_ready(lane);
  warp.waiting.clear();
}

void copy_async(uint32_t to, const void* from, int bytes, bool valid) {
  if (valid) checked_global(from, bytes, false);
  std::memset(checked_shared(to, bytes), kPoison, bytes);
  current->uncommitted.push_back({to, from, bytes, valid});
}

void commit_copies() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void wait_for_copies_but(int groups) {
  while (static_cast<int>(current->groups.size()) > groups) {
    for (const Copy& copy : current->groups.front()) {
      unsigned char* to = checked_shared(copy.to, copy.bytes);
      if (copy.valid) {
        std::memcpy(to, copy.from, copy.bytes);
      } else {
        std::memset(to, 0, copy.bytes);
      }
    }
    current->groups.pop_front();
  }
}

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      const uint16_t b = static_cast<uint16_t>(i);
      _Float16 h;
      std::memcpy(&h, &b, 2);
      values[i] = static_cast<float>(h);
    }
    return values;
  }();
  return table[bits];
}

uint16_t float_to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

int run_blocks(const LaunchShape& shape, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) < shape.threads) {
    stacks.emplace_back(new char[kStackBytes]);
  }
  kernel = &body;
  blocks = shape.blocks;
  for (block = 0; block < shape.blocks; ++block) {
    shared.assign(shape.shared_bytes, kPoison);
    lanes.assign(shape.threads, Lane());
    warps.assign(shape.threads / 32, Warp());
    ready.assign(shape.threads / 32, {});
    barriers.clear();
    failure = nullptr;
    last_warp = -1;
    for (int i = 0; i < shape.threads; ++i) {
      Lane& lane = lanes[i];
      lane.thread = i;
      getcontext(&lane.start);
      lane.start.uc_stack.ss_sp = stacks[i].get();
      lane.start.uc_stack.ss_size = kStackBytes;
      lane.start.uc_link = nullptr;
      makecontext(&lane.start, run_lane, 0);
      make_ready(&lane);
    }
    run_block(shape.threads);
  }
  return 0;
}

}  // namespace cifar_resnet_fast
