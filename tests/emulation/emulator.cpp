// Fibers, barriers and checked memory of the emulated device; see emulator.h.
#include "emulator.h"

#include <limits.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
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
  bool waited;  // for the kernel before
  int thread;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Barrier {
  int expected = 0;
  std::vector<Lane*> waiting;
};

constexpr int kMaxWarps = 32;  // of a block

// An *epoch* of a warp lies between two barriers of its lanes. `seen` has for each warp the last
// epoch that lies behind a barrier for this one.
struct Warp {
  int arrived = 0;
  void (*act)(Operands* const*);
  Operands* operands[32];
  std::vector<Lane*> waiting;
  int epoch = 1;
  std::array<int, kMaxWarps> seen = {};
};

// Who touched 4 bytes of shared memory, and in which epoch of its warp; epoch 0: nobody.
constexpr int kSeveralLanes = -1;
struct Touch {
  int epoch = 0;
  int lane;  // of the warp
};
struct Word {
  Touch write;
  int writer;              // its warp
  bool in_flight = false;  // the write is a copy that has not been waited for
  Touch read[kMaxWarps];   // by warp, since the write
};

// `touched` has for each byte, where the tensor may be written, block + 1 if that block wrote it,
// - block - 1 if only that one read it, kSeveralBlocks if several read it.
constexpr int kSeveralBlocks = INT_MIN;
struct Range {
  const char* start;
  size_t bytes;
  bool writable;
  std::vector<int> touched;
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
std::vector<Word> words;  // of shared
const std::function<void()>* kernel;
Lane* current;
int block, blocks, rows_of_blocks, last_warp;
bool overlapped;
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

// Whether a barrier lies between `touch`, by a lane of warp `by`, and what `lane` of the running
// warp does now.
bool ordered(const Touch& touch, int by, int lane) {
  const int warp = current->thread / 32;
  if (touch.epoch == 0 || (by == warp && touch.lane == lane)) return true;
  return touch.epoch <= (by == warp ? warps[warp].epoch - 1 : warps[warp].seen[by]);
}

// false: a race
bool touch_shared(Word& word, bool write, int lane) {
  const int warp = current->thread / 32;
  if (word.in_flight || !ordered(word.write, word.writer, lane)) return false;
  const Touch now = {warps[warp].epoch, lane};
  if (!write) {
    Touch& read = word.read[warp];
    const bool another = read.epoch == now.epoch && read.lane != lane;
    read = now;
    if (another) read.lane = kSeveralLanes;
    return true;
  }
  for (size_t by = 0; by < warps.size(); ++by) {
    if (!ordered(word.read[by], static_cast<int>(by), lane)) return false;
    word.read[by].epoch = 0;
  }
  word.write = now;
  word.writer = warp;
  return true;
}

void touch_global(int* touched, size_t bytes, bool write) {
  const int mine = block + 1;
  for (size_t i = 0; i < bytes; ++i) {
    const int by = touched[i];
    if (by != 0 && by != mine && (write ? by != -mine : by > 0)) {
      throw std::runtime_error("race with another block" + where());
    }
    if (write) {
      touched[i] = mine;
    } else if (by <= 0) {
      touched[i] = by == 0 || by == -mine ? -mine : kSeveralBlocks;
    }
  }
}

// Lanes that have met at a barrier: whole warps, each of which begins a new epoch.
void begin_epoch(const std::vector<Lane*>& met) {
  std::array<int, kMaxWarps> arrived = {}, seen = {};
  for (const Lane* lane : met) ++arrived[lane->thread / 32];
  for (size_t w = 0; w < warps.size(); ++w) {
    if (arrived[w] == 0) continue;
    if (arrived[w] != 32) throw std::runtime_error("part of a warp at a barrier" + where());
    for (size_t i = 0; i < warps.size(); ++i) seen[i] = std::max(seen[i], warps[w].seen[i]);
    seen[w] = std::max(seen[w], warps[w].epoch);
  }
  for (size_t w = 0; w < warps.size(); ++w) {
    if (arrived[w] == 0) continue;
    warps[w].seen = seen;
    ++warps[w].epoch;
  }
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
      if (!lane->waited) throw std::runtime_error("no wait for the kernel before" + where());
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
  const std::vector<int> touched(writable ? bytes : 0);
  ranges.push_back({static_cast<const char*>(start), bytes, writable, touched});
}

void forbid_all() {
  ranges.clear();
}

int thread_index() {
  return current->thread;
}
int block_index() {
  return block % blocks;
}
unsigned block_row() {
  return block / blocks;
}
unsigned block_rows() {
  return rows_of_blocks;
}
int block_count() {
  return blocks;
}

void* checked_global(const void* p, size_t bytes, Access access) {
  const char* first = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    throw std::runtime_error("misaligned access to global memory" + where());
  }
  if (!current->waited && access != Access::kReadConstant) {
    throw std::runtime_error("access before the wait for the kernel before" + where());
  }
  const bool write = access == Access::kWrite;
  for (size_t i = 0; i < ranges.size(); ++i) {
    Range& range = ranges[(last_range + i) % ranges.size()];
    if (first >= range.start && first + bytes <= range.start + range.bytes &&
        (range.writable ? access != Access::kReadConstant : !write)) {
      last_range = (last_range + i) % ranges.size();
      if (range.writable) touch_global(&range.touched[first - range.start], bytes, write);
      return const_cast<char*>(first);
    }
  }
  throw std::runtime_error(std::string(write ? "write" : "read") + " outside every tensor" +
                           where());
}

unsigned char* checked_shared(uint32_t address, size_t bytes, Access access, int lane) {
  if (address + bytes > shared.size() || address % bytes != 0) {
    throw std::runtime_error("shared address " + std::to_string(address) + " of " +
                             std::to_string(shared.size()) + where());
  }
  for (size_t i = address / 4; i < (address + bytes) / 4; ++i) {
    if (!touch_shared(words[i], access == Access::kWrite, lane)) {
      throw std::runtime_error("race at shared address " + std::to_string(i * 4) + where());
    }
  }
  return shared.data() + address;
}

unsigned char* checked_shared(uint32_t address, size_t bytes, Access access) {
  return checked_shared(address, bytes, access, current->thread % 32);
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
  std::vector<Lane*> met;
  met.swap(b.waiting);
  met.push_back(current);
  begin_epoch(met);
  for (Lane* lane : met) make_ready(lane);
  stop_until_ready();
}

void block_barrier() {
  barrier(0, static_cast<int>(lanes.size()));
}

void with_whole_warp(Operands& mine, void (*act)(Operands* const*)) {
  Warp& warp = warps[current->thread / 32];
  if (warp.arrived > 0 && warp.act != act) {
    throw std::runtime_error("lanes of a warp meet in different instructions" + where());
  }
  warp.act = act;
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

void warp_barrier() {
  Operands mine;
  with_whole_warp(mine, [](Operands* const*) { ++warps[current->thread / 32].epoch; });
}

void wait_for_kernel_before() {
  current->waited = true;
}

void copy_async(uint32_t to, const void* from, int bytes, bool valid) {
  if (valid) checked_global(from, bytes, Access::kRead);
  std::memset(checked_shared(to, bytes, Access::kWrite), kPoison, bytes);
  for (int i = 0; i < bytes / 4; ++i) words[to / 4 + i].in_flight = true;
  current->uncommitted.push_back({to, from, bytes, valid});
}

void commit_copies() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void wait_for_copies_but(int groups) {
  while (static_cast<int>(current->groups.size()) > groups) {
    for (const Copy& copy : current->groups.front()) {
      for (int i = 0; i < copy.bytes / 4; ++i) words[copy.to / 4 + i].in_flight = false;
      unsigned char* to = checked_shared(copy.to, copy.bytes, Access::kWrite);
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

bool last_overlapped() {
  return overlapped;
}

int run_blocks(const LaunchShape& shape, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) < shape.threads) {
    stacks.emplace_back(new char[kStackBytes]);
  }
  if (shape.threads > kMaxWarps * 32 || shape.threads % 32 != 0) {
    throw std::runtime_error("a block of " + std::to_string(shape.threads) + " threads");
  }
  kernel = &body;
  blocks = shape.blocks;
  rows_of_blocks = shape.rows;
  overlapped = shape.overlap;
  for (Range& range : ranges) std::fill(range.touched.begin(), range.touched.end(), 0);
  for (block = 0; block < shape.blocks * shape.rows; ++block) {
    shared.assign(shape.shared_bytes, kPoison);
    words.assign((shape.shared_bytes + 3) / 4, Word());
    lanes.assign(shape.threads, Lane());
    warps.assign(shape.threads / 32, Warp());
    ready.assign(shape.threads / 32, {});
    barriers.clear();
    failure = nullptr;
    last_warp = -1;
    for (int i = 0; i < shape.threads; ++i) {
      Lane& lane = lanes[i];
      lane.thread = i;
      lane.waited = !shape.overlap;
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
