// What a launch costs, counted as a card would count it: 32-byte sectors of global memory,
// wavefronts of shared memory with its 32 banks of 4 bytes, instructions by pipe, and instruction
// slots in which a warp waits at a barrier for those that have more to do.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "program.h"

namespace ptx {

struct WarpCounts {
  std::array<uint64_t, kPipes> instructions{};
  uint64_t sectors = 0, sector_bytes = 0;  // of global memory; bytes of them that were asked for
  uint64_t wavefronts = 0, least_wavefronts = 0;
  uint64_t barriers = 0, waited = 0;
  uint64_t transposed = 0, copies = 0;  // ldmatrix.trans and cp.async: they tell roles apart
};

struct InstructionCounts {
  uint64_t executed = 0, wavefronts = 0, least_wavefronts = 0;
};

struct Counters {
  std::vector<WarpCounts> warps;                // by number in the block, over all blocks
  std::vector<InstructionCounts> instructions;  // of the program
};

struct Sectors {
  int count, bytes;
};
// Of one instruction of a warp; `addresses` of the lanes in `lanes`.
Sectors sectors_of(const uint64_t (&addresses)[32], Lanes lanes, uint32_t bytes);

struct Wavefronts {
  int count, least;
};
// As many lanes as 128 bytes hold go at once, in order; words of one bank take a wavefront each.
Wavefronts wavefronts_of(const uint32_t (&addresses)[32], Lanes lanes, uint32_t bytes);

}  // namespace ptx
