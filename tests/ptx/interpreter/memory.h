// Memory that knows who touched it when, and says what is wrong with an access.
//
// Only barriers order the lanes of a warp and the warps of a block, and nothing orders the blocks
// of a launch. Each warp has a clock, which every barrier it passes advances, and knows how far
// the clocks of the others were when it last met them (a vector clock).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

constexpr int kWholeWarp = 32;  // "lane" of what a warp reads together, as ldmatrix does
constexpr int kSeveral = 33;    // "lane" of what several lanes have read

// When a place was touched, and by which lane of which warp. Clock 0: never.
struct Stamp {
  uint32_t clock = 0;
  uint8_t warp = 0, lane = 0;
};

// Who touches memory now.
struct Actor {
  int block, warp, lane;
  uint32_t clock;
  const uint32_t* known;  // clocks of the block's warps

  // whether a barrier orders what was stamped before this
  bool after(const Stamp& stamp) const {
    if (stamp.clock == 0) return true;
    if (stamp.warp != warp) return known[stamp.warp] >= stamp.clock;
    return stamp.clock < clock || (stamp.lane == lane && lane < kWholeWarp);
  }
  Stamp stamp() const { return {clock, static_cast<uint8_t>(warp), static_cast<uint8_t>(lane)}; }
};

// What is wrong with an access; null: nothing.
using Problem = const char*;

// A block's shared memory, by address in its window.
class SharedMemory {
 public:
  void reset(size_t bytes, int warps);
  // the place; throws Failure where it is outside or misaligned
  uint8_t* at(uint32_t address, uint32_t bytes);
  Problem read(const Actor& actor, uint32_t address, uint32_t bytes);
  // and stores `data`
  Problem write(const Actor& actor, uint32_t address, uint32_t bytes, const uint8_t* data);
  // The destination of a copy is nobody's between these.
  Problem begin_copy(const Actor& actor, uint32_t address, uint32_t bytes);
  void end_copy(const Actor& actor, uint32_t address, uint32_t bytes, const uint8_t* data);

 private:
  struct Cell {  // two bytes
    Stamp written;
    bool copying = false;
  };
  Problem check_write(const Actor& actor, size_t cell) const;
  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
  std::vector<Stamp> reads_;  // [cell][warp]
  int warps_ = 0;
};

// The tensors that the next launches may touch, at their addresses in the host's memory.
class GlobalMemory {
 public:
  void allow(const void* start, size_t bytes, bool writable);
  void forbid_all() { regions_.clear(); }
  // Everything launched so far has ended.
  void synchronise();
  // A launch that overlaps begins while those before may still run.
  void begin_launch(bool overlaps);
  void end_launch();

  // `waited`: the warp is past griddepcontrol.wait, or its launch does not overlap. Both throw
  // Failure where the access is outside of every tensor, misaligned, or writes a constant.
  Problem read(const Actor& actor, uint64_t address, uint32_t bytes, uint32_t alignment,
               bool waited);
  Problem write(const Actor& actor, uint64_t address, uint32_t bytes, const uint8_t* data,
                bool waited);

 private:
  struct Cell {                         // a byte, during one launch
    int written_by = -1, read_by = -1;  // blocks
    bool read_by_several = false;
    Stamp written, read;
  };
  struct Region {
    uint64_t start, end;
    bool writable;
    std::vector<Cell> cells;  // of a writable one
  };
  using Range = std::pair<uint64_t, uint64_t>;
  Region& find(uint64_t address, uint32_t bytes, uint32_t alignment, bool writes);
  std::vector<Region> regions_;
  size_t last_ = 0;
  // written by launches that may still run, and by those that have ended
  std::vector<Range> in_flight_, settled_;
};

}  // namespace ptx
