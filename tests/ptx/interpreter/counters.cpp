#include "counters.h"

#include <algorithm>

namespace ptx {
namespace {

// first and last + 1 byte of each lane, sorted, with overlaps joined: distinct bytes
int distinct_bytes(uint64_t (&starts)[32], int count, uint32_t bytes) {
  std::sort(starts, starts + count);
  int total = 0;
  uint64_t end = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t last = starts[i] + bytes;
    if (last > end) total += static_cast<int>(last - std::max(end, starts[i]));
    end = std::max(end, last);
  }
  return total;
}

}  // namespace

Sectors sectors_of(const uint64_t (&addresses)[32], Lanes lanes, uint32_t bytes) {
  uint64_t starts[32], sectors[64];
  int count = 0, touched = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    starts[count++] = addresses[i];
    const uint64_t first = addresses[i] / 32, last = (addresses[i] + bytes - 1) / 32;
    for (uint64_t s = first; s <= last; ++s) {
      if (std::find(sectors, sectors + touched, s) == sectors + touched) sectors[touched++] = s;
    }
  }
  return {touched, distinct_bytes(starts, count, bytes)};
}

Wavefronts wavefronts_of(const uint32_t (&addresses)[32], Lanes lanes, uint32_t bytes) {
  const int together = static_cast<int>(128 / std::max(bytes, 4u));
  Wavefronts made{0, 0};
  for (int first = 0; first < 32; first += together) {
    uint32_t words[128];
    int count = 0, in_bank[32] = {};
    for (int i = first; i < first + together; ++i) {
      if (!(lanes >> i & 1)) continue;
      for (uint32_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
        if (std::find(words, words + count, word) != words + count) continue;
        words[count++] = word;
        ++in_bank[word % 32];
      }
    }
    made.count += *std::max_element(in_bank, in_bank + 32);
    made.least += count > 0;
  }
  return made;
}

}  // namespace ptx
