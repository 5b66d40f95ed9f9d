#include "machine.h"

#include <algorithm>
#include <climits>
#include <numeric>

namespace ptx {
namespace {

constexpr int kNever = INT_MAX;

void start_warp(Warp& warp, const Program& program, const Launch& launch) {
  for (const Program::Constant& c : program.constants) {
    if (c.width == 1) {
      warp.predicate(c.place) = c.value ? kAllLanes : 0;
      continue;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (c.width == 64) {
        warp.put<uint64_t>(c.place, lane, c.value);
      } else {
        warp.put<uint32_t>(c.place, lane, static_cast<uint32_t>(c.value));
      }
    }
  }
  for (const Program::SpecialRegister& s : program.specials) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t t = warp.id * 32 + lane;
      const uint32_t* const size = launch.threads;
      const uint32_t thread[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      uint32_t value = 0;
      switch (s.which) {
        case Special::kThread:
          value = thread[s.axis];
          break;
        case Special::kBlock:
          value = warp.block->index[s.axis];
          break;
        case Special::kThreads:
          value = size[s.axis];
          break;
        case Special::kBlocks:
          value = launch.blocks[s.axis];
          break;
        case Special::kLane:
          value = lane;
          break;
        case Special::kWarp:
          value = warp.id;
          break;
      }
      warp.put<uint32_t>(s.place, lane, value);
    }
  }
}

// in the order of the setting
std::vector<uint32_t> ordered(uint32_t count, Order order, std::mt19937_64& random) {
  std::vector<uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::kReversed) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

}  // namespace

// ---- a warp ----

const Instruction& Warp::instruction() const {
  return block->program->code[at];
}

Actor Warp::actor(int lane) const {
  return {static_cast<int>(block->number), id, lane, clock, known.data()};
}

static std::string described(const Warp& warp, const std::string& text, int lane) {
  const Instruction& in = warp.instruction();
  return text + ": warp " + std::to_string(warp.id) +
         (lane < 32 ? " lane " + std::to_string(lane) : "") + " in line " +
         std::to_string(in.line) + " (" + in.name + ")";
}

void Warp::report(Problem problem, int lane) const {
  // the first lane stands for all that an instruction has this problem with
  if (problem != nullptr) {
    block->machine->report(described(*this, problem, lane),
                           problem + std::to_string(instruction().line));
  }
}

void Warp::fail(const std::string& text, int lane) const {
  throw Failure(described(*this, text, lane));
}

// ---- barriers ----

// operand and constant: id, threads; see parser.cpp
void Machine::arrive(Warp& warp, const Instruction& in, int lane) {
  Block& block = *warp.block;
  const auto all = static_cast<uint32_t>(block.warps.size() * 32);
  const auto value = [&](int i) {
    return in.operand[i] < 0 ? static_cast<uint32_t>(in.constant[i])
                             : warp.get<uint32_t>(in.operand[i], lane);
  };
  const uint32_t id = value(0), threads = in.operand[1] == -2 ? all : value(1);
  if (id > 15) warp.fail("barrier " + std::to_string(id), lane);
  if (threads % 32 != 0) warp.fail("barrier of a part of a warp", lane);
  Barrier& barrier = block.barriers[id];
  if (!barrier.warps.empty() && barrier.expected != threads) {
    warp.fail("barrier " + std::to_string(id) + " with " + std::to_string(threads) +
                  " threads and with " + std::to_string(barrier.expected),
              lane);
  }
  barrier.expected = threads;
  barrier.warps.push_back(&warp);
  warp.at_barrier = true;
  ++warp.counts->barriers;
  if (barrier.warps.size() * 32 < threads) return;
  // all are there: each now knows what all knew
  uint64_t most = 0;
  std::vector<uint32_t> known(block.warps.size(), 0);
  for (const Warp* w : barrier.warps) {
    for (size_t v = 0; v < known.size(); ++v) known[v] = std::max(known[v], w->known[v]);
    known[w->id] = std::max(known[w->id], w->clock);
    most = std::max(most, w->since_barrier);
  }
  for (Warp* w : barrier.warps) {
    w->known = known;
    ++w->clock;
    w->counts->waited += most - w->since_barrier;
    w->since_barrier = 0;
    w->at_barrier = false;
  }
  barrier = {};
}

// ---- running ----

void Machine::run_warp(Warp& warp, int64_t budget) {
  const std::vector<Instruction>& code = warp.block->program->code;
  std::vector<InstructionCounts>& counts = counters.instructions;
  while (warp.live) {
    const Lanes ready = warp.live & ~warp.blocked;
    if (!ready) {
      const int lane = std::countr_zero(warp.blocked);
      warp.at = warp.pc[lane];
      warp.fail("lanes of a warp wait for each other in different instructions", lane);
    }
    // the lanes that are furthest behind, and where the next are
    int pc = kNever, next = kNever;
    Lanes here = 0;
    for (int i = 0; i < 32; ++i) {
      if (!(ready >> i & 1)) continue;
      if (warp.pc[i] < pc) {
        next = pc, pc = warp.pc[i], here = Lanes{1} << i;
      } else if (warp.pc[i] == pc) {
        here |= Lanes{1} << i;
      } else {
        next = std::min(next, warp.pc[i]);
      }
    }
    const auto leave_at = [&](Lanes lanes, int place) {
      for (int i = 0; i < 32; ++i) {
        if (lanes >> i & 1) warp.pc[i] = place;
      }
    };
    while (here && pc < next && budget > 0) {
      const Instruction& in = code[pc];
      warp.at = pc;
      --budget;
      Lanes active = here;
      if (in.guard >= 0) {
        const Lanes guard = warp.predicate(in.guard);
        active &= in.negated ? ~guard : guard;
      }
      if (!active) {
        ++pc;
        continue;
      }
      ++counts[pc].executed;
      ++warp.counts->instructions[static_cast<int>(in.pipe)];
      ++warp.since_barrier;
      if (in.kind == Kind::kPlain) {
        in.execute(warp, in, active);
        ++pc;
      } else if (in.kind == Kind::kBranch) {
        const int target = static_cast<int>(in.constant[0]);
        if (active == here) {
          pc = target;
        } else {
          leave_at(active, target);
          leave_at(here & ~active, pc + 1);
          here = 0;
        }
      } else if (in.kind == Kind::kExit) {
        warp.live &= ~active;
        here &= ~active;
        ++pc;
        if (!warp.live && !warp.copies.empty()) {
          warp.report("copies that nothing waits for", 32);
        }
      } else {
        const int lane = std::countr_zero(active);
        if (active != here) warp.fail("a guard divides lanes that must act together", lane);
        for (int i = 0; i < 32; ++i) {
          if ((warp.blocked >> i & 1) && warp.pc[i] == pc) here |= Lanes{1} << i;
        }
        const Lanes needed =
            in.members < 0 ? warp.live : warp.get<uint32_t>(in.members, lane) & warp.live;
        if (here & ~needed) warp.fail("a lane that is no member of its instruction", lane);
        if (here != needed) {
          leave_at(here, pc);
          warp.blocked |= here;
          here = 0;
          continue;
        }
        warp.blocked &= ~here;
        ++pc;
        if (in.kind == Kind::kTogether) {
          in.execute(warp, in, here);
          continue;
        }
        leave_at(here, pc);
        arrive(warp, in, lane);
        if (warp.at_barrier) return;
      }
    }
    leave_at(here, pc);
    if (budget <= 0) return;
  }
}

void Machine::run_block(Block& block) {
  for (;;) {
    bool alive = false, moved = false;
    for (const uint32_t i : ordered(static_cast<uint32_t>(block.warps.size()), order, random_)) {
      Warp& warp = block.warps[i];
      if (!warp.live) continue;
      alive = true;
      if (warp.at_barrier) continue;
      moved = true;
      run_warp(warp,
               order == Order::kRandom ? 1 + static_cast<int64_t>(random_() % 400) : INT64_MAX);
    }
    if (!alive) break;
    if (!moved) {
      std::string text = "deadlock at barriers:";
      for (const Warp& warp : block.warps) {
        if (warp.live) {
          text += " warp " + std::to_string(warp.id) + " in line " +
                  std::to_string(warp.instruction().line);
        }
      }
      throw Failure(text);
    }
  }
  for (const Barrier& barrier : block.barriers) {
    if (!barrier.warps.empty()) throw Failure("a barrier that some warps never reach");
  }
}

// ---- launches ----

std::vector<std::string> Machine::load(const std::string& text) {
  std::vector<std::string> names;
  for (auto& [name, entry] : find_entries(text)) {
    names.push_back(name);
    programs_.erase(name);
    executed.erase(name);
    entries_[name] = entry;
  }
  return names;
}

const Program& Machine::program(const std::string& name) {
  std::unique_ptr<Program>& program = programs_[name];
  if (!program) {
    const auto entry = entries_.find(name);
    if (entry == entries_.end()) throw Failure("no kernel of the name " + name);
    program = std::make_unique<Program>(parse(name, entry->second));
  }
  return *program;
}

void Machine::run(const Launch& launch, const uint8_t* parameters) {
  const Program& program = this->program(launch.kernel);
  const uint32_t threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
  const uint32_t blocks = launch.blocks[0] * launch.blocks[1] * launch.blocks[2];
  if (threads == 0 || threads > static_cast<uint32_t>(program.max_threads)) {
    throw Failure("a block of " + std::to_string(threads) + " threads, of at most " +
                  std::to_string(program.max_threads));
  }
  if (blocks == 0 || launch.blocks[1] > 65535 || launch.blocks[2] > 65535) {
    throw Failure("bad grid");
  }
  random_.seed(seed);
  const bool overlaps = launch.overlaps && architecture >= 90;
  memory.begin_launch(overlaps);
  const size_t warps = (threads + 31) / 32;
  last_kernel = launch.kernel;
  counters.warps.assign(warps, {});
  counters.instructions.assign(program.code.size(), {});
  std::vector<uint64_t> registers(program.register_bytes / 8 * warps);
  Block block{this, &program, parameters, 0, {}, {}, {}, {}};
  for (const uint32_t number : ordered(blocks, order, random_)) {
    block.number = number;
    block.index[0] = number % launch.blocks[0];
    block.index[1] = number / launch.blocks[0] % launch.blocks[1];
    block.index[2] = number / launch.blocks[0] / launch.blocks[1];
    block.shared.reset(program.dynamic_shared_at + launch.dynamic_shared, static_cast<int>(warps));
    block.warps.assign(warps, {});
    std::fill(registers.begin(), registers.end(), ~uint64_t{0});
    for (Warp& warp : block.warps) {
      warp.block = &block;
      warp.id = static_cast<int>(&warp - block.warps.data());
      warp.registers =
          reinterpret_cast<uint8_t*>(registers.data()) + program.register_bytes * warp.id;
      warp.counts = &counters.warps[warp.id];
      warp.known.assign(warps, 0);
      warp.waited_for_kernel = !overlaps;
      const uint32_t lanes = std::min(32u, threads - warp.id * 32);
      warp.live = lanes == 32 ? kAllLanes : (Lanes{1} << lanes) - 1;
      start_warp(warp, program, launch);
    }
    run_block(block);
    for (const Warp& warp : block.warps) {
      if (!warp.waited_for_kernel) {
        const std::string text = " never waits for the kernel before: griddepcontrol.wait";
        report("warp " + std::to_string(warp.id) + text, text);
      }
    }
  }
  memory.end_launch();
  std::vector<InstructionCounts>& all = executed[launch.kernel];
  all.resize(program.code.size());
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].executed += counters.instructions[i].executed;
    all[i].wavefronts += counters.instructions[i].wavefronts;
    all[i].least_wavefronts += counters.instructions[i].least_wavefronts;
  }
}

std::vector<std::string> Machine::take_findings() {
  std::vector<std::string> found;
  for (const auto& [key, finding] : findings_) found.push_back(finding);
  findings_.clear();
  return found;
}

}  // namespace ptx
