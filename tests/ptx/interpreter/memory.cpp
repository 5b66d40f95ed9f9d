#include "memory.h"

#include <algorithm>
#include <cstring>

#include "program.h"

namespace ptx {

// ---- shared memory ----

void SharedMemory::reset(size_t bytes, int warps) {
  bytes_.assign(bytes, 0xff);  // NaN in every format
  cells_.assign((bytes + 1) / 2, {});
  reads_.assign(cells_.size() * warps, {});
  warps_ = warps;
}

uint8_t* SharedMemory::at(uint32_t address, uint32_t bytes) {
  const int64_t offset = int64_t{address} - kSharedStart;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > bytes_.size()) {
    throw Failure("shared memory out of bounds: " + std::to_string(bytes) + " bytes at " +
                  std::to_string(offset) + " of " + std::to_string(bytes_.size()));
  }
  if (address % bytes != 0) throw Failure("misaligned access to shared memory");
  return bytes_.data() + offset;
}

Problem SharedMemory::read(const Actor& actor, uint32_t address, uint32_t bytes) {
  const size_t first = (address - kSharedStart) / 2,
               end = (address - kSharedStart + bytes + 1) / 2;
  Problem problem = nullptr;
  for (size_t c = first; c < end; ++c) {
    const Cell& cell = cells_[c];
    if (cell.copying) {
      problem = "shared memory read before the wait for the copy to it";
    } else if (cell.written.clock == 0) {
      problem = "shared memory read that nothing has written";
    } else if (!actor.after(cell.written)) {
      problem = cell.written.warp == actor.warp
                    ? "shared memory read with no barrier of the warp after the write"
                    : "shared memory read with no barrier after the write";
    }
    Stamp& read = reads_[c * warps_ + actor.warp];
    const bool another = read.clock == actor.clock && read.lane != actor.lane;
    read = actor.stamp();
    if (another) read.lane = kSeveral;
  }
  return problem;
}

Problem SharedMemory::check_write(const Actor& actor, size_t c) const {
  const Cell& cell = cells_[c];
  if (cell.copying) return "shared memory written before the wait for the copy to it";
  if (!actor.after(cell.written)) return "shared memory written twice with no barrier between";
  for (int w = 0; w < warps_; ++w) {
    if (!actor.after(reads_[c * warps_ + w])) {
      return w == actor.warp ? "shared memory written with no barrier of the warp after a read"
                             : "shared memory written with no barrier after a read";
    }
  }
  return nullptr;
}

Problem SharedMemory::write(const Actor& actor, uint32_t address, uint32_t bytes,
                            const uint8_t* data) {
  uint8_t* const to = at(address, bytes);
  Problem problem = nullptr;
  for (uint32_t i = 0; i < bytes; i += 2) {
    const size_t c = (address - kSharedStart + i) / 2;
    Cell& cell = cells_[c];
    // lanes may store one value to one place
    const bool same =
        cell.written.clock && std::memcmp(to + i, data + i, std::min(2u, bytes)) == 0;
    if (same && !cell.copying) continue;
    if (const Problem found = check_write(actor, c)) problem = found;
    cell = {actor.stamp(), false};
  }
  std::memcpy(to, data, bytes);
  return problem;
}

Problem SharedMemory::begin_copy(const Actor& actor, uint32_t address, uint32_t bytes) {
  at(address, bytes);
  Problem problem = nullptr;
  for (uint32_t i = 0; i < bytes; i += 2) {
    const size_t c = (address - kSharedStart + i) / 2;
    if (const Problem found = check_write(actor, c)) problem = found;
    cells_[c].copying = true;
  }
  return problem;
}

void SharedMemory::end_copy(const Actor& actor, uint32_t address, uint32_t bytes,
                            const uint8_t* data) {
  for (uint32_t i = 0; i < bytes; i += 2) {
    cells_[(address - kSharedStart + i) / 2] = {actor.stamp(), false};
  }
  std::memcpy(at(address, bytes), data, bytes);
}

// ---- global memory ----

void GlobalMemory::allow(const void* start, size_t bytes, bool writable) {
  const auto first = reinterpret_cast<uint64_t>(start);
  regions_.push_back({first, first + bytes, writable, {}});
}

void GlobalMemory::synchronise() {
  settled_.insert(settled_.end(), in_flight_.begin(), in_flight_.end());
  in_flight_.clear();
}

void GlobalMemory::begin_launch(bool overlaps) {
  if (!overlaps) synchronise();
  for (Region& region : regions_) {
    if (region.writable) region.cells.assign(region.end - region.start, {});
  }
}

void GlobalMemory::end_launch() {
  for (const Region& region : regions_) {
    if (region.writable) in_flight_.emplace_back(region.start, region.end);
  }
}

GlobalMemory::Region& GlobalMemory::find(uint64_t address, uint32_t bytes, uint32_t alignment,
                                         bool writes) {
  const auto holds = [&](const Region& region) {
    return address >= region.start && address + bytes <= region.end &&
           (region.writable || !writes);
  };
  if (last_ >= regions_.size() || !holds(regions_[last_])) {
    last_ = std::find_if(regions_.begin(), regions_.end(), holds) - regions_.begin();
  }
  if (last_ == regions_.size()) {
    std::string text = std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) +
                       " bytes outside of every tensor";
    for (const Region& region : regions_) {
      const auto offset = static_cast<int64_t>(address - region.start);
      const auto size = static_cast<int64_t>(region.end - region.start);
      if (offset > -4096 && offset < size + 4096) {
        text += ", at " + std::to_string(offset) + " of one of " + std::to_string(size) +
                (region.writable ? " bytes" : " bytes that is only read");
      }
    }
    throw Failure(text);
  }
  if (address % alignment != 0) throw Failure("misaligned access to global memory");
  return regions_[last_];
}

Problem GlobalMemory::read(const Actor& actor, uint64_t address, uint32_t bytes,
                           uint32_t alignment, bool waited) {
  Region& region = find(address, bytes, alignment, false);
  Problem problem = nullptr;
  if (!waited) {
    const auto touches = [&](const Range& range) {
      return address < range.second && address + bytes > range.first;
    };
    if (std::any_of(in_flight_.begin(), in_flight_.end(), touches) ||
        std::none_of(settled_.begin(), settled_.end(), touches)) {
      problem = "global memory read before griddepcontrol.wait";
    }
  }
  if (!region.writable) return problem;
  for (uint32_t i = 0; i < bytes; ++i) {
    Cell& cell = region.cells[address - region.start + i];
    if (cell.written_by >= 0 && (cell.written_by != actor.block || !actor.after(cell.written))) {
      problem = cell.written_by != actor.block
                    ? "global memory read that another block writes"
                    : "global memory read with no barrier after the write";
    }
    cell.read_by_several |= cell.read_by >= 0 && cell.read_by != actor.block;
    cell.read_by = actor.block;
    cell.read = actor.stamp();
  }
  return problem;
}

Problem GlobalMemory::write(const Actor& actor, uint64_t address, uint32_t bytes,
                            const uint8_t* data, bool waited) {
  Region& region = find(address, bytes, bytes, true);
  Problem problem = waited ? nullptr : "global memory written before griddepcontrol.wait";
  for (uint32_t i = 0; i < bytes; ++i) {
    Cell& cell = region.cells[address - region.start + i];
    const bool same = cell.written_by >= 0 && reinterpret_cast<uint8_t*>(address)[i] == data[i];
    if (!same && cell.written_by >= 0 &&
        (cell.written_by != actor.block || !actor.after(cell.written))) {
      problem = cell.written_by != actor.block ? "global memory written by two blocks"
                                               : "global memory written twice with no barrier";
    }
    if (cell.read_by >= 0 &&
        (cell.read_by_several || cell.read_by != actor.block || !actor.after(cell.read))) {
      problem = cell.read_by != actor.block || cell.read_by_several
                    ? "global memory written that another block reads"
                    : "global memory written with no barrier after a read";
    }
    cell.written_by = actor.block;
    cell.written = actor.stamp();
  }
  std::memcpy(reinterpret_cast<void*>(address), data, bytes);
  return problem;
}

}  // namespace ptx
