// A kernel of a PTX text as the machine executes it: instructions whose operands are places in a
// warp's register file.
//
// A register of up to 32 bits takes 32 words of 4 bytes, one a lane, a register of 64 bits 32
// words of 8 bytes, and a predicate one word of 4 bytes with one bit a lane. Constants and special
// registers have places, too, so that no instruction has to tell them apart.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

using Lanes = uint32_t;  // one bit a lane
constexpr Lanes kAllLanes = 0xffffffffu;

// A mistake of the kernel, or an instruction that is unknown: the launch ends.
struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, Lanes);

enum class Kind : uint8_t {
  kPlain,
  kBranch,
  kExit,
  kBarrier,   // of a block or of some of its warps
  kTogether,  // waits until all lanes that take part are there
};

// What an instruction keeps busy. "Moves" are those that the assembler mostly removes.
enum class Pipe : uint8_t {
  kTensor,
  kFloat,
  kInteger,
  kConvert,
  kShared,
  kGlobal,
  kMove,
  kControl
};
constexpr int kPipes = 8;

struct Instruction {
  Execute execute = nullptr;
  Kind kind = Kind::kPlain;
  Pipe pipe = Pipe::kMove;
  bool negated = false;  // the guard
  int guard = -1;        // place of a predicate; -1: always
  int members = -1;      // kTogether: place of the mask of lanes; -1: all that live
  std::array<int, 16> operand{};
  std::array<int64_t, 6> constant{};
  int line = 0;      // of the PTX text
  std::string name;  // with all its qualifiers
};

enum class Special : uint8_t { kThread, kBlock, kThreads, kBlocks, kLane, kWarp };

struct Program {
  struct Parameter {
    size_t offset, bytes;
  };
  struct Constant {
    int place, width;
    uint64_t value;
  };
  struct SpecialRegister {
    int place;
    Special which;
    int axis;
  };
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  std::vector<Constant> constants;
  std::vector<SpecialRegister> specials;
  size_t register_bytes = 0, parameter_bytes = 0;
  size_t static_shared = 0, dynamic_shared_at = 0;
  int max_threads = 1024;
};

constexpr uint32_t kSharedStart = 0x400;  // of shared memory in its window: null is no place in it

// What the table of instructions.cpp says of one instruction that has no form of its own.
struct Known {
  Execute execute;
  Kind kind;
  Pipe pipe;
  std::string operands;  // 'p' predicate, 'w' up to 32 bits, 'd' 64 bits; the first is written
};
const Known* find_instruction(const std::string& name);

// One .entry of a PTX text, not yet parsed.
struct Entry {
  std::string parameters, directives, body, module;
  int line;
};
std::map<std::string, Entry> find_entries(const std::string& text);
Program parse(const std::string& name, const Entry& entry);

}  // namespace ptx
