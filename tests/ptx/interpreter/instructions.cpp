// What each instruction does to the registers and the memory of a warp's lanes.
//
// Floating point is IEEE's, rounded to nearest even, as PTX has it. What a card only approximates
// (ex2, lg2, div.full) is rounded correctly here. A tensor core's products are exact; eight of
// them and the accumulator are added at a time and rounded towards zero, as cards of sm_80 were
// seen to.
//
// Source: Parallel Thread Execution ISA, chapter 9; Fasi et al. 2021, "Numerical behavior of
// NVIDIA tensor cores".
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using In = Instruction;

// ---- 16-bit floating point ----

struct Half {
  u16 bits;
  operator float() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
};
struct BFloat {
  u16 bits;
  operator float() const { return std::bit_cast<float>(u32{bits} << 16); }
};
template <class T16>
T16 rounded(float v) {
  if (v != v) return {0x7fff};
  if constexpr (std::is_same_v<T16, Half>) {
    return {std::bit_cast<u16>(static_cast<_Float16>(v))};
  } else {
    const u32 bits = std::bit_cast<u32>(v);
    return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
}
template <class T16>
u32 rounded_pair(float high, float low) {
  return u32{rounded<T16>(high).bits} << 16 | rounded<T16>(low).bits;
}

// ---- lane by lane ----

template <class T>
void put_lanes(Warp& w, int place, Lanes lanes, const T (&values)[32]) {
  if (place < 0) return;
  if (lanes == kAllLanes) {
    for (int i = 0; i < 32; ++i) w.put<T>(place, i, values[i]);
  } else {
    for (int i = 0; i < 32; ++i) {
      if (lanes >> i & 1) w.put<T>(place, i, values[i]);
    }
  }
}

template <class D, class A, auto F>
void unary(Warp& w, const In& in, Lanes lanes) {
  D d[32];
  for (int i = 0; i < 32; ++i) d[i] = F(w.get<A>(in.operand[1], i));
  put_lanes(w, in.operand[0], lanes, d);
}
template <class D, class A, class B, auto F>
void binary(Warp& w, const In& in, Lanes lanes) {
  D d[32];
  for (int i = 0; i < 32; ++i) {
    d[i] = F(w.get<A>(in.operand[1], i), w.get<B>(in.operand[2], i));
  }
  put_lanes(w, in.operand[0], lanes, d);
}
template <class D, class A, class B, class C, auto F>
void ternary(Warp& w, const In& in, Lanes lanes) {
  D d[32];
  for (int i = 0; i < 32; ++i) {
    d[i] = F(w.get<A>(in.operand[1], i), w.get<B>(in.operand[2], i), w.get<C>(in.operand[3], i));
  }
  put_lanes(w, in.operand[0], lanes, d);
}
template <class T, auto F>
void compare(Warp& w, const In& in, Lanes lanes) {
  Lanes bits = 0;
  for (int i = 0; i < 32; ++i) {
    const bool holds = F(w.get<T>(in.operand[1], i), w.get<T>(in.operand[2], i));
    bits |= Lanes{holds} << i;
  }
  w.put_predicate(in.operand[0], lanes, bits);
}
template <auto F>
void predicates(Warp& w, const In& in, Lanes lanes) {
  w.put_predicate(in.operand[0], lanes, F(w.predicate(in.operand[1]), w.predicate(in.operand[2])));
}
template <class T>
void select(Warp& w, const In& in, Lanes lanes) {
  T d[32];
  const Lanes p = w.predicate(in.operand[3]);
  for (int i = 0; i < 32; ++i) d[i] = w.get<T>(p >> i & 1 ? in.operand[1] : in.operand[2], i);
  put_lanes(w, in.operand[0], lanes, d);
}
// of both halves of a pair: ones where true
template <auto F>
void set_pair(Warp& w, const In& in, Lanes lanes) {
  u32 d[32];
  for (int i = 0; i < 32; ++i) {
    const u32 a = w.get<u32>(in.operand[1], i), b = w.get<u32>(in.operand[2], i);
    const auto half = [](u32 x) { return static_cast<float>(Half{static_cast<u16>(x)}); };
    d[i] =
        (F(half(a), half(b)) ? 0xffffu : 0u) | (F(half(a >> 16), half(b >> 16)) ? ~0xffffu : 0u);
  }
  put_lanes(w, in.operand[0], lanes, d);
}
void logic_3(Warp& w, const In& in, Lanes lanes) {
  u32 d[32];
  for (int i = 0; i < 32; ++i) {
    const u32 a = w.get<u32>(in.operand[1], i), b = w.get<u32>(in.operand[2], i),
              c = w.get<u32>(in.operand[3], i);
    d[i] = 0;
    for (int k = 0; k < 8; ++k) {
      if (in.constant[0] >> k & 1) {
        d[i] |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
      }
    }
  }
  put_lanes(w, in.operand[0], lanes, d);
}
void insert_bits(Warp& w, const In& in, Lanes lanes) {  // bfi: a into b at c, d bits
  u32 d[32];
  for (int i = 0; i < 32; ++i) {
    const u32 at = w.get<u32>(in.operand[3], i) & 255, count = w.get<u32>(in.operand[4], i) & 255;
    const u64 field = at > 31 ? 0 : ((count > 31 ? 0 : u64{1} << count) - 1) << at;
    const u32 here = static_cast<u32>(field);
    d[i] = (w.get<u32>(in.operand[2], i) & ~here) |
           (static_cast<u32>(u64{w.get<u32>(in.operand[1], i)} << (at & 31)) & here);
  }
  put_lanes(w, in.operand[0], lanes, d);
}
template <class T>
T extracted_bits(T a, u32 at, u32 count) {
  at &= 255, count &= 255;
  if (count == 0) return 0;
  const s64 wide = std::is_signed_v<T> ? s64{a} : static_cast<s64>(static_cast<u32>(a));
  const s64 moved = at > 31 ? (wide < 0 ? -1 : 0) : wide >> at;
  if (count > 31) return static_cast<T>(moved);
  const u32 field = (u32{1} << count) - 1;
  const u32 top = std::min(at + count - 1, 31u);
  const bool negative = std::is_signed_v<T> && (static_cast<u32>(a) >> top & 1);
  return static_cast<T>((static_cast<u32>(moved) & field) | (negative ? ~field : 0));
}
u32 permuted(u32 a, u32 b, u32 selector) {
  const u64 both = u64{b} << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> (4 * i) & 15;
    u32 byte = static_cast<u8>(both >> (8 * (s & 7)));
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// COUNT registers of BITS to one of COUNT * BITS, and back; operand: the parts, the whole
template <class Whole, class Part, int COUNT>
void join(Warp& w, const In& in, Lanes lanes) {
  Whole d[32];
  for (int i = 0; i < 32; ++i) {
    d[i] = 0;
    for (int k = 0; k < COUNT; ++k) {
      d[i] |= static_cast<Whole>(static_cast<Whole>(w.get<Part>(in.operand[k], i))
                                 << (k * sizeof(Part) * 8));
    }
  }
  put_lanes(w, in.operand[COUNT], lanes, d);
}
template <class Whole, class Part, int COUNT>
void split(Warp& w, const In& in, Lanes lanes) {
  Whole whole[32];
  for (int i = 0; i < 32; ++i) whole[i] = w.get<Whole>(in.operand[COUNT], i);
  for (int k = 0; k < COUNT; ++k) {
    Part d[32];
    for (int i = 0; i < 32; ++i) d[i] = static_cast<Part>(whole[i] >> (k * sizeof(Part) * 8));
    put_lanes(w, in.operand[k], lanes, d);
  }
}

// ---- memory ----
// operand: values, base; constant: bytes of a value, signed, values, offset, 64-bit registers

void count_shared(Warp& w, const u32 (&addresses)[32], Lanes lanes, u32 bytes) {
  const Wavefronts made = wavefronts_of(addresses, lanes, bytes);
  w.counts->wavefronts += made.count;
  w.counts->least_wavefronts += made.least;
  InstructionCounts& counts = w.block->machine->counters.instructions[w.at];
  counts.wavefronts += made.count;
  counts.least_wavefronts += made.least;
}
void count_global(Warp& w, const u64 (&addresses)[32], Lanes lanes, u32 bytes) {
  const Sectors made = sectors_of(addresses, lanes, bytes);
  w.counts->sectors += made.count;
  w.counts->sector_bytes += made.bytes;
}

void put_loaded(Warp& w, const In& in, int v, int lane, const u8* data) {
  if (in.operand[v] < 0) return;
  const u32 bytes = static_cast<u32>(in.constant[0]), unused = 64 - 8 * bytes;
  u64 value = 0;
  std::memcpy(&value, data + v * bytes, bytes);
  if (in.constant[1]) value = static_cast<u64>(static_cast<s64>(value << unused) >> unused);
  if (in.constant[4]) {
    w.put<u64>(in.operand[v], lane, value);
  } else {
    w.put<u32>(in.operand[v], lane, static_cast<u32>(value));
  }
}
template <bool SHARED>
void load(Warp& w, const In& in, Lanes lanes) {
  using Address = std::conditional_t<SHARED, u32, u64>;
  const int values = static_cast<int>(in.constant[2]);
  const u32 bytes = static_cast<u32>(in.constant[0] * values);
  Address addresses[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    addresses[i] = static_cast<Address>(w.get<Address>(in.operand[values], i) + in.constant[3]);
    const u8* from;
    if constexpr (SHARED) {
      from = w.block->shared.at(addresses[i], bytes);
      w.report(w.block->shared.read(w.actor(i), addresses[i], bytes), i);
    } else {
      from = reinterpret_cast<const u8*>(addresses[i]);
      w.report(w.block->machine->memory.read(w.actor(i), addresses[i], bytes, bytes,
                                             w.waited_for_kernel),
               i);
    }
    u8 data[32];
    std::memcpy(data, from, bytes);
    for (int v = 0; v < values; ++v) put_loaded(w, in, v, i, data);
  }
  if constexpr (SHARED) {
    count_shared(w, addresses, lanes, bytes);
  } else {
    count_global(w, addresses, lanes, bytes);
  }
}
template <bool SHARED>
void store(Warp& w, const In& in, Lanes lanes) {
  using Address = std::conditional_t<SHARED, u32, u64>;
  const int values = static_cast<int>(in.constant[2]);
  const u32 one = static_cast<u32>(in.constant[0]), bytes = one * values;
  Address addresses[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    addresses[i] = static_cast<Address>(w.get<Address>(in.operand[values], i) + in.constant[3]);
    u8 data[32];
    for (int v = 0; v < values; ++v) {
      const u64 value =
          in.constant[4] ? w.get<u64>(in.operand[v], i) : w.get<u32>(in.operand[v], i);
      std::memcpy(data + v * one, &value, one);
    }
    if constexpr (SHARED) {
      w.report(w.block->shared.write(w.actor(i), addresses[i], bytes, data), i);
    } else {
      w.report(w.block->machine->memory.write(w.actor(i), addresses[i], bytes, data,
                                              w.waited_for_kernel),
               i);
    }
  }
  if constexpr (SHARED) {
    count_shared(w, addresses, lanes, bytes);
  } else {
    count_global(w, addresses, lanes, bytes);
  }
}
void load_parameter(Warp& w, const In& in, Lanes lanes) {
  const int values = static_cast<int>(in.constant[2]), base = in.operand[values];
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    const u64 at = (base < 0 ? 0 : w.get<u64>(base, i)) + in.constant[3];
    if (at + in.constant[0] * values > w.block->program->parameter_bytes) {
      w.fail("read outside of the parameters", i);
    }
    for (int v = 0; v < values; ++v) put_loaded(w, in, v, i, w.block->parameters + at);
  }
}

// operand: to, from[, bytes that are read]; constant: bytes, offsets, whether some are not read
void copy_async(Warp& w, const In& in, Lanes lanes) {
  const u32 bytes = static_cast<u32>(in.constant[0]);
  u32 to[32] = {};
  u64 from[32] = {};
  Lanes reading = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    Copy copy{};
    copy.to = to[i] = w.get<u32>(in.operand[0], i) + static_cast<u32>(in.constant[1]);
    copy.from = from[i] = w.get<u64>(in.operand[1], i) + in.constant[2];
    copy.bytes = bytes;
    copy.read = in.constant[3] ? w.get<u32>(in.operand[2], i) : bytes;
    copy.group = w.groups[i];
    copy.lane = i;
    if (copy.read > bytes) w.fail("a copy that reads more than it writes", i);
    if (copy.read > 0) {
      reading |= Lanes{1} << i;
      w.report(w.block->machine->memory.read(w.actor(i), copy.from, copy.read, bytes,
                                             w.waited_for_kernel),
               i);
      std::memcpy(copy.data, reinterpret_cast<const void*>(copy.from), copy.read);
    }
    w.report(w.block->shared.begin_copy(w.actor(i), copy.to, bytes), i);
    if (w.block->machine->early_copies) {
      std::memcpy(w.block->shared.at(copy.to, bytes), copy.data, bytes);
    }
    w.copies.push_back(copy);
  }
  ++w.counts->copies;
  count_shared(w, to, lanes, bytes);
  count_global(w, from, reading, bytes);
}
void commit_copies(Warp& w, const In&, Lanes lanes) {
  for (int i = 0; i < 32; ++i) w.groups[i] += lanes >> i & 1;
}
void finish_copies(Warp& w, Lanes lanes, u32 outstanding, bool also_uncommitted) {
  std::vector<Copy> left;
  for (Copy& copy : w.copies) {
    const bool done = (lanes >> copy.lane & 1) &&
                      (also_uncommitted || copy.group + outstanding < w.groups[copy.lane]);
    if (!done) {
      left.push_back(copy);
      continue;
    }
    if (std::memcmp(copy.data, reinterpret_cast<const void*>(copy.from), copy.read) != 0) {
      w.report("the source of a copy changed before the wait for it", copy.lane);
    }
    w.block->shared.end_copy(w.actor(copy.lane), copy.to, copy.bytes, copy.data);
  }
  w.copies = std::move(left);
}
void wait_for_copies(Warp& w, const In& in, Lanes lanes) {
  finish_copies(w, lanes, static_cast<u32>(in.constant[0]), false);
}
void wait_for_all_copies(Warp& w, const In&, Lanes lanes) {
  finish_copies(w, lanes, 0, true);
}
void wait_for_kernel(Warp& w, const In&, Lanes lanes) {
  if (lanes != w.live) w.report("griddepcontrol.wait by a part of a warp", 32);
  w.waited_for_kernel = true;
}

// ---- lanes together ----

void warp_barrier(Warp& w, const In&, Lanes lanes) {
  // one of a part of the warp orders its lanes only; the clock is the whole warp's
  if (lanes == w.live) ++w.clock;
}

// operand: d, predicate or -1, a, b, c; constant: 0 bfly, 1 idx, 2 up, 3 down
void shuffle(Warp& w, const In& in, Lanes lanes) {
  u32 d[32] = {};
  Lanes inside = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    const int b = w.get<u32>(in.operand[3], i) & 31;
    const u32 c = w.get<u32>(in.operand[4], i);
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int last = (i & segment) | (clamp & ~segment);
    const int from[] = {i ^ b, (i & segment) | (b & ~segment), i - b, i + b};
    int j = from[in.constant[0]];
    const bool is_inside = in.constant[0] == 2 ? j >= last : j <= last;
    if (!is_inside) j = i;
    inside |= Lanes{is_inside} << i;
    if (!(lanes >> j & 1)) w.fail("a shuffle from a lane that takes no part", i);
    d[i] = w.get<u32>(in.operand[2], j);
  }
  put_lanes(w, in.operand[0], lanes, d);
  if (in.operand[1] >= 0) w.put_predicate(in.operand[1], lanes, inside);
}
template <class T, auto F>
void reduce(Warp& w, const In& in, Lanes lanes) {
  T total = w.get<T>(in.operand[1], std::countr_zero(lanes));
  for (int i = std::countr_zero(lanes) + 1; i < 32; ++i) {
    if (lanes >> i & 1) total = F(total, w.get<T>(in.operand[1], i));
  }
  T d[32];
  std::fill(d, d + 32, total);
  put_lanes(w, in.operand[0], lanes, d);
}

// operand: matrices, base; constant: matrices, transposed, offset
void load_matrices(Warp& w, const In& in, Lanes lanes) {
  if (lanes != kAllLanes) w.fail("ldmatrix by a part of a warp", 32);
  const int count = static_cast<int>(in.constant[0]);
  u16 element[4][8][8];
  u32 rows[32] = {};
  for (int i = 0; i < 8 * count; ++i) {
    rows[i] = w.get<u32>(in.operand[count], i) + static_cast<u32>(in.constant[2]);
    std::memcpy(element[i / 8][i % 8], w.block->shared.at(rows[i], 16), 16);
    w.report(w.block->shared.read(w.actor(kWholeWarp), rows[i], 16), i);
  }
  for (int k = 0; k < count; ++k) {
    u32 d[32];
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = 2 * (i % 4);
      d[i] = in.constant[1] ? element[k][t][g] | u32{element[k][t + 1][g]} << 16
                            : element[k][g][t] | u32{element[k][g][t + 1]} << 16;
    }
    put_lanes(w, in.operand[k], lanes, d);
  }
  w.counts->transposed += in.constant[1];
  count_shared(w, rows, count == 4 ? kAllLanes : (Lanes{1} << 8 * count) - 1, 16);
}

float rounded_to_zero(double d) {
  const float f = static_cast<float>(d);
  if (std::isinf(f) && std::isfinite(d)) {
    return std::copysign(std::numeric_limits<float>::max(), f);
  }
  if (std::fabs(static_cast<double>(f)) <= std::fabs(d) || f != f) return f;
  return std::bit_cast<float>(std::bit_cast<u32>(f) - 1);
}

// d[16, 8] = a[16, DEPTH] b[DEPTH, 8] + c, PAIRED elements a register; operand: d 4, a, b, c 4
template <int DEPTH, int PAIRED, auto DECODE>
void multiply(Warp& w, const In& in, Lanes lanes) {
  if (lanes != kAllLanes) w.fail("mma by a part of a warp", 32);
  constexpr int A = DEPTH / 4 / PAIRED * 2, B = A / 2;  // registers
  double a[16][DEPTH], b[DEPTH][8], c[16][8];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    for (int r = 0; r < A; ++r) {
      const u32 bits = w.get<u32>(in.operand[4 + r], i);
      for (int p = 0; p < PAIRED; ++p) {
        a[g + 8 * (r & 1)][(t + 4 * (r >> 1)) * PAIRED + p] = DECODE(bits, p);
      }
    }
    for (int r = 0; r < B; ++r) {
      const u32 bits = w.get<u32>(in.operand[4 + A + r], i);
      for (int p = 0; p < PAIRED; ++p) b[(t + 4 * r) * PAIRED + p][g] = DECODE(bits, p);
    }
    for (int r = 0; r < 4; ++r) {
      c[g + 8 * (r >> 1)][2 * t + (r & 1)] = w.get<float>(in.operand[4 + A + B + r], i);
    }
  }
  for (int first = 0; first < DEPTH; first += 8) {
    for (int row = 0; row < 16; ++row) {
      double sum[8];
      for (int n = 0; n < 8; ++n) sum[n] = c[row][n];
      for (int k = first; k < first + 8; ++k) {
        for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
      }
      for (int n = 0; n < 8; ++n) c[row][n] = rounded_to_zero(sum[n]);
    }
  }
  for (int r = 0; r < 4; ++r) {
    float d[32];
    for (int i = 0; i < 32; ++i) {
      d[i] = static_cast<float>(c[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)]);
    }
    put_lanes(w, in.operand[r], lanes, d);
  }
}
template <class T16>
constexpr auto half_of_pair = [](u32 bits, int p) {
  return static_cast<double>(static_cast<float>(T16{static_cast<u16>(bits >> 16 * p)}));
};
// the low 13 bits are ignored
constexpr auto tf32_of = [](u32 bits, int) {
  return static_cast<double>(std::bit_cast<float>(bits & 0xffffe000u));
};

// ---- the table ----

template <class T>
constexpr char kOperand = sizeof(T) == 8 ? 'd' : 'w';

class Table {
 public:
  Table();
  std::unordered_map<std::string, Known> known;

 private:
  void add(const std::string& name, Pipe pipe, std::string operands, Execute execute,
           Kind kind = Kind::kPlain) {
    known[name] = {execute, kind, pipe, std::move(operands)};
  }
  template <class D, class A, auto F>
  void one(const std::string& name, Pipe pipe) {
    add(name, pipe, {kOperand<D>, kOperand<A>}, unary<D, A, F>);
  }
  template <class D, class A, class B, auto F>
  void two(const std::string& name, Pipe pipe) {
    add(name, pipe, {kOperand<D>, kOperand<A>, kOperand<B>}, binary<D, A, B, F>);
  }
  template <class D, class A, class B, class C, auto F>
  void three(const std::string& name, Pipe pipe) {
    add(name, pipe, {kOperand<D>, kOperand<A>, kOperand<B>, kOperand<C>}, ternary<D, A, B, C, F>);
  }
  template <class T, auto F>
  void test(const std::string& name, Pipe pipe) {
    add("setp." + name, pipe, {'p', kOperand<T>, kOperand<T>}, compare<T, F>);
  }
  template <class U, class S>
  void integers(const std::string& bits);
  template <class T>
  void floats(const std::string& type);
  template <class T16>
  void halves(const std::string& type);
  template <class S>
  void conversions_from(const std::string& type);
  void integer_specials();
  void approximations();
  void memory();
  void together();
};

template <class U, class S>
void Table::integers(const std::string& bits) {
  constexpr auto P = Pipe::kInteger;
  constexpr u32 kBits = sizeof(U) * 8;
  const std::string s = ".s" + bits, u = ".u" + bits, b = ".b" + bits;
  for (const std::string& type : {s, u, b}) {
    one<U, U, [](U x) { return x; }>("mov" + type, Pipe::kMove);
    two<U, U, U, [](U x, U y) { return static_cast<U>(x + y); }>("add" + type, P);
    two<U, U, U, [](U x, U y) { return static_cast<U>(x - y); }>("sub" + type, P);
    two<U, U, U, [](U x, U y) { return static_cast<U>(u64{x} * y); }>("mul.lo" + type, P);
    three<U, U, U, U, [](U x, U y, U z) { return static_cast<U>(u64{x} * y + z); }>(
        "mad.lo" + type, P);
    test<U, [](U x, U y) { return x == y; }>("eq" + type, P);
    test<U, [](U x, U y) { return x != y; }>("ne" + type, P);
    add("selp" + type, P, {kOperand<U>, kOperand<U>, kOperand<U>, 'p'}, select<U>);
  }
  two<U, U, U, [](U x, U y) { return static_cast<U>(x & y); }>("and" + b, P);
  two<U, U, U, [](U x, U y) { return static_cast<U>(x | y); }>("or" + b, P);
  two<U, U, U, [](U x, U y) { return static_cast<U>(x ^ y); }>("xor" + b, P);
  one<U, U, [](U x) { return static_cast<U>(~x); }>("not" + b, P);
  one<U, U, [](U x) { return static_cast<U>(-x); }>("neg" + s, P);
  one<U, S, [](S x) { return static_cast<U>(x < 0 ? -static_cast<U>(x) : static_cast<U>(x)); }>(
      "abs" + s, P);
  two<U, U, u32, [](U x, u32 n) { return static_cast<U>(n >= kBits ? 0 : x << n); }>("shl" + b, P);
  for (const std::string& type : {u, b}) {
    two<U, U, u32, [](U x, u32 n) { return static_cast<U>(n >= kBits ? 0 : x >> n); }>(
        "shr" + type, P);
  }
  two<U, S, u32, [](S x, u32 n) { return static_cast<U>(x >> std::min(n, kBits - 1)); }>("shr" + s,
                                                                                         P);
  two<U, U, U, [](U x, U y) { return static_cast<U>(y ? x / y : ~U{0}); }>("div" + u, P);
  two<U, U, U, [](U x, U y) { return static_cast<U>(y ? x % y : x); }>("rem" + u, P);
  two<U, S, S, [](S x, S y) {
    return static_cast<U>(y == 0 ? U(~U{0}) : y == -1 ? -static_cast<U>(x) : U(S(x / y)));
  }>("div" + s, P);
  two<U, S, S, [](S x, S y) { return static_cast<U>(y == 0    ? x
                                                    : y == -1 ? S{0}
                                                              : S(x % y)); }>(
      "rem" + s, P);
  const auto ordered = [&]<class T>(T, const std::string& type) {
    two<T, T, T, [](T x, T y) { return std::min(x, y); }>("min" + type, P);
    two<T, T, T, [](T x, T y) { return std::max(x, y); }>("max" + type, P);
    test<T, [](T x, T y) { return x < y; }>("lt" + type, P);
    test<T, [](T x, T y) { return x <= y; }>("le" + type, P);
    test<T, [](T x, T y) { return y < x; }>("gt" + type, P);
    test<T, [](T x, T y) { return y <= x; }>("ge" + type, P);
  };
  ordered(S{}, s);
  ordered(U{}, u);
}

template <class T>
void Table::floats(const std::string& type) {
  constexpr auto P = Pipe::kFloat;
  one<T, T, [](T x) { return x; }>("mov" + type, Pipe::kMove);
  two<T, T, T, [](T x, T y) { return x + y; }>("add" + type, P);
  two<T, T, T, [](T x, T y) { return x - y; }>("sub" + type, P);
  two<T, T, T, [](T x, T y) { return x * y; }>("mul" + type, P);
  two<T, T, T, [](T x, T y) { return x / y; }>("div" + type, P);
  three<T, T, T, T, [](T x, T y, T z) { return std::fma(x, y, z); }>("fma" + type, P);
  one<T, T, [](T x) { return T{1} / x; }>("rcp" + type, P);
  one<T, T, [](T x) { return std::sqrt(x); }>("sqrt" + type, P);
  one<T, T, [](T x) { return -x; }>("neg" + type, P);
  one<T, T, [](T x) { return std::fabs(x); }>("abs" + type, P);
  two<T, T, T, [](T x, T y) { return std::fmin(x, y); }>("min" + type, P);
  two<T, T, T, [](T x, T y) { return std::fmax(x, y); }>("max" + type, P);
  two<T, T, T, [](T x, T y) { return x != x || y != y ? x + y : std::fmax(x, y); }>(
      "max.NaN" + type, P);
  two<T, T, T, [](T x, T y) { return x != x || y != y ? x + y : std::fmin(x, y); }>(
      "min.NaN" + type, P);
  add("selp" + type, P, {kOperand<T>, kOperand<T>, kOperand<T>, 'p'}, select<T>);
  test<T, [](T x, T y) { return x == y; }>("eq" + type, P);
  test<T, [](T x, T y) { return x < y || y < x; }>("ne" + type, P);
  test<T, [](T x, T y) { return x < y; }>("lt" + type, P);
  test<T, [](T x, T y) { return x <= y; }>("le" + type, P);
  test<T, [](T x, T y) { return y < x; }>("gt" + type, P);
  test<T, [](T x, T y) { return y <= x; }>("ge" + type, P);
  // "u": or unordered
  test<T, [](T x, T y) { return !(x < y || x > y); }>("equ" + type, P);
  test<T, [](T x, T y) { return x != y; }>("neu" + type, P);
  test<T, [](T x, T y) { return !(x >= y); }>("ltu" + type, P);
  test<T, [](T x, T y) { return !(y < x); }>("leu" + type, P);
  test<T, [](T x, T y) { return !(x <= y); }>("gtu" + type, P);
  test<T, [](T x, T y) { return !(x < y); }>("geu" + type, P);
  test<T, [](T x, T y) { return x != x || y != y; }>("nan" + type, P);
}

template <class T16>
void Table::halves(const std::string& type) {
  constexpr auto P = Pipe::kFloat;
  test<T16, [](float x, float y) { return x < y; }>("lt" + type, P);
  test<T16, [](float x, float y) { return y < x; }>("gt" + type, P);
  test<T16, [](float x, float y) { return x <= y; }>("le" + type, P);
  test<T16, [](float x, float y) { return y <= x; }>("ge" + type, P);
  test<T16, [](float x, float y) { return x == y; }>("eq" + type, P);
  test<T16, [](float x, float y) { return x != y; }>("neu" + type, P);
  test<T16, [](float x, float y) { return x != x || y != y; }>("nan" + type, P);
  one<float, T16, [](T16 x) { return static_cast<float>(x); }>("cvt.f32" + type, Pipe::kConvert);
  one<u16, float, [](float x) { return rounded<T16>(x).bits; }>("cvt" + type + ".f32",
                                                                Pipe::kConvert);
  two<u32, float, float, rounded_pair<T16>>("cvt" + type + "x2.f32", Pipe::kConvert);
}

template <class S>
void Table::conversions_from(const std::string& type) {
  const auto to = [&]<class D>(D, const std::string& name) {
    one<D, S, [](S x) { return static_cast<D>(x); }>("cvt." + name + type, Pipe::kConvert);
  };
  to(u8{}, "u8"), to(s8{}, "s8"), to(u16{}, "u16"), to(s16{}, "s16");
  to(u32{}, "u32"), to(s32{}, "s32"), to(u64{}, "u64"), to(s64{}, "s64");
  to(float{}, "f32"), to(double{}, "f64");
}

void Table::integer_specials() {
  constexpr auto P = Pipe::kInteger;
  two<s64, s32, s32, [](s32 x, s32 y) { return s64{x} * y; }>("mul.wide.s32", P);
  two<u64, u32, u32, [](u32 x, u32 y) { return u64{x} * y; }>("mul.wide.u32", P);
  two<u32, u16, u16, [](u16 x, u16 y) { return u32{x} * y; }>("mul.wide.u16", P);
  two<s32, s16, s16, [](s16 x, s16 y) { return s32{x} * y; }>("mul.wide.s16", P);
  three<s64, s32, s32, s64, [](s32 x, s32 y, s64 z) { return s64{x} * y + z; }>("mad.wide.s32", P);
  three<u64, u32, u32, u64, [](u32 x, u32 y, u64 z) { return u64{x} * y + z; }>("mad.wide.u32", P);
  three<u32, u16, u16, u32, [](u16 x, u16 y, u32 z) { return u32{x} * y + z; }>("mad.wide.u16", P);
  two<u32, u32, u32, [](u32 x, u32 y) { return static_cast<u32>(u64{x} * y >> 32); }>("mul.hi.u32",
                                                                                      P);
  two<s32, s32, s32, [](s32 x, s32 y) { return static_cast<s32>(s64{x} * y >> 32); }>("mul.hi.s32",
                                                                                      P);
  two<u16, u16, u16, [](u16 x, u16 y) { return static_cast<u16>(u32{x} * y >> 16); }>("mul.hi.u16",
                                                                                      P);
  two<s16, s16, s16, [](s16 x, s16 y) { return static_cast<s16>(s32{x} * y >> 16); }>("mul.hi.s16",
                                                                                      P);
  three<u32, u32, u32, u32, extracted_bits<u32>>("bfe.u32", P);
  three<s32, s32, u32, u32, extracted_bits<s32>>("bfe.s32", P);
  three<u32, u32, u32, u32, permuted>("prmt.b32", P);
  three<u32, u32, u32, u32, [](u32 low, u32 high, u32 n) {
    return static_cast<u32>((u64{high} << 32 | low) << (n & 31) >> 32);
  }>("shf.l.wrap.b32", P);
  three<u32, u32, u32, u32, [](u32 low, u32 high, u32 n) {
    return static_cast<u32>((u64{high} << 32 | low) >> (n & 31));
  }>("shf.r.wrap.b32", P);
  one<u32, u32, [](u32 x) { return static_cast<u32>(std::popcount(x)); }>("popc.b32", P);
  one<u32, u32, [](u32 x) { return static_cast<u32>(std::countl_zero(x)); }>("clz.b32", P);
  one<u32, u32, [](u32 x) {
    u32 reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
  }>("brev.b32", P);
  add("bfi.b32", P, "wwwww", insert_bits);
  add("lop3.b32", P, "", logic_3);
  add("mov.pred", Pipe::kMove, "pp", [](Warp& w, const In& in, Lanes lanes) {
    w.put_predicate(in.operand[0], lanes, w.predicate(in.operand[1]));
  });
  add("not.pred", P, "pp", [](Warp& w, const In& in, Lanes lanes) {
    w.put_predicate(in.operand[0], lanes, ~w.predicate(in.operand[1]));
  });
  add("and.pred", P, "ppp", predicates<std::bit_and<Lanes>{}>);
  add("or.pred", P, "ppp", predicates<std::bit_or<Lanes>{}>);
  add("xor.pred", P, "ppp", predicates<std::bit_xor<Lanes>{}>);
  add("join.2x16", Pipe::kMove, "", join<u32, u16, 2>);
  add("join.2x32", Pipe::kMove, "", join<u64, u32, 2>);
  add("join.4x16", Pipe::kMove, "", join<u64, u16, 4>);
  add("join.4x8", Pipe::kMove, "", join<u32, u8, 4>);
  add("split.2x16", Pipe::kMove, "", split<u32, u16, 2>);
  add("split.2x32", Pipe::kMove, "", split<u64, u32, 2>);
  add("split.4x16", Pipe::kMove, "", split<u64, u16, 4>);
  add("split.4x8", Pipe::kMove, "", split<u32, u8, 4>);
}

// subnormal numbers are zeros where an instruction says .ftz
float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

void Table::approximations() {
  constexpr auto P = Pipe::kFloat;
  one<float, float, [](float x) { return std::exp2(x); }>("ex2.approx.f32", P);
  one<float, float, [](float x) { return flushed(std::exp2(flushed(x))); }>("ex2.approx.ftz.f32",
                                                                            P);
  one<float, float, [](float x) { return std::log2(x); }>("lg2.approx.f32", P);
  two<float, float, float, [](float x, float y) { return flushed(flushed(x) + flushed(y)); }>(
      "add.ftz.f32", P);
  two<float, float, float, [](float x, float y) { return flushed(flushed(x) * flushed(y)); }>(
      "mul.ftz.f32", P);
  three<float, float, float, float, [](float x, float y, float z) {
    return flushed(std::fma(flushed(x), flushed(y), flushed(z)));
  }>("fma.ftz.f32", P);
  two<float, float, float, [](float x, float y) { return x / y; }>("div.full.f32", P);
}

void Table::memory() {
  constexpr auto S = Pipe::kShared, G = Pipe::kGlobal;
  add("ld.shared", S, "", load<true>);
  add("st.shared", S, "", store<true>);
  add("ld.global", G, "", load<false>);
  add("st.global", G, "", store<false>);
  add("ld.param", Pipe::kMove, "", load_parameter);
  add("cp.async", G, "", copy_async);
  add("cp.async.commit_group", Pipe::kControl, "", commit_copies);
  add("cp.async.wait_group", Pipe::kControl, "", wait_for_copies);
  add("cp.async.wait_all", Pipe::kControl, "", wait_for_all_copies);
  add("griddepcontrol.wait", Pipe::kControl, "", wait_for_kernel);
  add("griddepcontrol.launch_dependents", Pipe::kControl, "", [](Warp&, const In&, Lanes) {});
  // where data lie in L2 is of no consequence here
  add("createpolicy.fractional.L2::evict_first.b64", Pipe::kMove, "dw",
      [](Warp&, const In&, Lanes) {});
}

void Table::together() {
  constexpr auto T = Kind::kTogether;
  add("bra", Pipe::kControl, "", nullptr, Kind::kBranch);
  add("exit", Pipe::kControl, "", nullptr, Kind::kExit);
  add("bar.sync", Pipe::kControl, "", nullptr, Kind::kBarrier);
  add("bar.warp.sync", Pipe::kControl, "", warp_barrier, T);
  add("shfl.sync", Pipe::kShared, "", shuffle, T);
  add("redux.sync.max.s32", Pipe::kInteger, "",
      reduce<s32, [](s32 x, s32 y) { return std::max(x, y); }>, T);
  add("redux.sync.min.s32", Pipe::kInteger, "",
      reduce<s32, [](s32 x, s32 y) { return std::min(x, y); }>, T);
  add("redux.sync.or.b32", Pipe::kInteger, "", reduce<u32, [](u32 x, u32 y) { return x | y; }>, T);
  add("ldmatrix", Pipe::kShared, "", load_matrices, T);
  add("mma.m16n8k16.f32.f16.f16.f32", Pipe::kTensor, "", multiply<16, 2, half_of_pair<Half>>, T);
  add("mma.m16n8k16.f32.bf16.bf16.f32", Pipe::kTensor, "", multiply<16, 2, half_of_pair<BFloat>>,
      T);
  add("mma.m16n8k8.f32.f16.f16.f32", Pipe::kTensor, "", multiply<8, 2, half_of_pair<Half>>, T);
  add("mma.m16n8k8.f32.bf16.bf16.f32", Pipe::kTensor, "", multiply<8, 2, half_of_pair<BFloat>>, T);
  add("mma.m16n8k8.f32.tf32.tf32.f32", Pipe::kTensor, "", multiply<8, 1, tf32_of>, T);
}

Table::Table() {
  integers<u16, s16>("16");
  integers<u32, s32>("32");
  integers<u64, s64>("64");
  floats<float>(".f32");
  floats<double>(".f64");
  halves<Half>(".f16");
  halves<BFloat>(".bf16");
  conversions_from<u8>(".u8");
  conversions_from<s8>(".s8");
  conversions_from<u16>(".u16");
  conversions_from<s16>(".s16");
  conversions_from<u32>(".u32");
  conversions_from<s32>(".s32");
  conversions_from<u64>(".u64");
  conversions_from<s64>(".s64");
  one<double, float, [](float x) { return static_cast<double>(x); }>("cvt.f64.f32",
                                                                     Pipe::kConvert);
  one<float, double, [](double x) { return static_cast<float>(x); }>("cvt.f32.f64",
                                                                     Pipe::kConvert);
  one<s32, float, [](float x) {
    return x != x              ? 0
           : x >= 2147483648.f ? std::numeric_limits<s32>::max()
           : x < -2147483648.f ? std::numeric_limits<s32>::min()
                               : static_cast<s32>(x);
  }>("cvt.rzi.s32.f32", Pipe::kConvert);
  add("set.gt.u32.f16x2", Pipe::kFloat, "www", set_pair<std::greater<float>{}>);
  add("set.gtu.u32.f16x2", Pipe::kFloat, "www",
      set_pair<[](float x, float y) { return !(x <= y); }>);
  approximations();
  integer_specials();
  memory();
  together();
}

}  // namespace

const Known* find_instruction(const std::string& name) {
  static const Table table;
  const auto found = table.known.find(name);
  return found == table.known.end() ? nullptr : &found->second;
}

}  // namespace ptx
