// Executes a grid: blocks one after the other, the warps of a block in an order that is a setting,
// the lanes of a warp in lockstep. A lane has its own program counter; those with the lowest run,
// and an instruction that needs other lanes waits until they are there.
#pragma once

#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "program.h"

namespace ptx {

enum class Order { kForward, kReversed, kRandom };  // of warps and blocks

struct Launch {
  std::string kernel;
  uint32_t blocks[3], threads[3];
  size_t dynamic_shared;
  bool overlaps;  // may start while the kernel before it runs
};

struct Copy {  // asynchronous, to shared memory
  uint32_t to;
  uint64_t from;
  uint32_t bytes, read;
  uint32_t group;
  int lane;
  uint8_t data[16];
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int id = 0;
  uint8_t* registers = nullptr;
  Lanes live = 0, blocked = 0;  // blocked: they wait for others of the warp
  int pc[32] = {};
  int at = 0;  // the instruction that runs
  uint32_t clock = 1;
  std::vector<uint32_t> known;  // see memory.h
  std::vector<Copy> copies;
  uint32_t groups[32] = {};  // of copies, that each lane has committed
  bool at_barrier = false, waited_for_kernel = false;
  uint64_t since_barrier = 0;  // instructions
  WarpCounts* counts = nullptr;

  const Instruction& instruction() const;
  Actor actor(int lane) const;
  // reports what is wrong at the running instruction
  void report(Problem problem, int lane) const;
  [[noreturn]] void fail(const std::string& text, int lane) const;

  template <class T>
  T get(int place, int lane) const {
    if constexpr (sizeof(T) == 8) {
      return std::bit_cast<T>(reinterpret_cast<const uint64_t*>(registers + place)[lane]);
    } else if constexpr (sizeof(T) == 4) {
      return std::bit_cast<T>(reinterpret_cast<const uint32_t*>(registers + place)[lane]);
    } else if constexpr (sizeof(T) == 2) {
      return std::bit_cast<T>(
          static_cast<uint16_t>(reinterpret_cast<const uint32_t*>(registers + place)[lane]));
    } else {
      return static_cast<T>(reinterpret_cast<const uint32_t*>(registers + place)[lane]);
    }
  }
  template <class T>
  void put(int place, int lane, T value) {
    if constexpr (sizeof(T) == 8) {
      reinterpret_cast<uint64_t*>(registers + place)[lane] = std::bit_cast<uint64_t>(value);
    } else if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint32_t*>(registers + place)[lane] = std::bit_cast<uint32_t>(value);
    } else {
      reinterpret_cast<uint32_t*>(registers + place)[lane] =
          static_cast<uint32_t>(static_cast<int32_t>(value));
    }
  }
  Lanes& predicate(int place) { return *reinterpret_cast<Lanes*>(registers + place); }
  void put_predicate(int place, Lanes lanes, Lanes bits) {
    Lanes& p = predicate(place);
    p = (p & ~lanes) | (bits & lanes);
  }
};

struct Barrier {
  uint32_t expected = 0;
  std::vector<Warp*> warps;
};

class Machine;

struct Block {
  Machine* machine;
  const Program* program;
  const uint8_t* parameters;
  uint32_t number, index[3];
  std::vector<Warp> warps;
  SharedMemory shared;
  Barrier barriers[16];
};

class Machine {
 public:
  // how blocks and warps run, and when the data of an asynchronous copy arrive: at once, or at the
  // wait for it
  Order order = Order::kForward;
  uint64_t seed = 1;
  bool early_copies = false;
  int architecture = 80;

  GlobalMemory memory;
  Counters counters;        // of the last launch
  std::string last_kernel;  // its name
  // the places of all instructions of a program that were executed, over all launches
  std::map<std::string, std::vector<InstructionCounts>> executed;

  // Adds the entries of a PTX text; a name that is there is replaced.
  std::vector<std::string> load(const std::string& text);
  void forget() { entries_.clear(), programs_.clear(), executed.clear(); }
  const Program& program(const std::string& name);
  // Runs it to its end; throws Failure where it cannot go on.
  void run(const Launch& launch, const uint8_t* parameters);
  // of findings with one key the first is kept
  void report(const std::string& finding, const std::string& key) {
    findings_.try_emplace(key, finding);
  }
  // what was wrong so far, which is then forgotten
  std::vector<std::string> take_findings();

 private:
  void run_block(Block& block);
  void run_warp(Warp& warp, int64_t budget);
  void arrive(Warp& warp, const Instruction& in, int lane);
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::unique_ptr<Program>> programs_;
  std::map<std::string, std::string> findings_;
  std::mt19937_64 random_;
};

}  // namespace ptx
