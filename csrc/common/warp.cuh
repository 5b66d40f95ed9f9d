// The instructions that the kernels are made of, by name.
//
// Baseline sm_80: ldmatrix, mma.sync m16n8k16 in fp16 and bf16, cp.async, named barriers. What
// only newer cards have (programmatic dependent launch, sm_90) is chosen at compile time.
//
// A shared-memory address is a 32-bit number in the shared window. A "pair" is two 16-bit values
// in one 32-bit register, the first in the low half. Lane l of a warp has group g = l / 4 and
// place t = l % 4: an mma result register pair holds row g (or g + 8), columns 2t and 2t + 1.
//
// The guard is a macro, not #pragma once, because tests/emulation/emulator.h defines it and brings
// the same functions for a CPU.
#ifndef CIFAR_RESNET_FAST_WARP_CUH_
#define CIFAR_RESNET_FAST_WARP_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

namespace cifar_resnet_fast {

extern __shared__ __align__(1024) unsigned char shared_memory[];

DEVICE uint32_t shared_start() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}
DEVICE int thread_index() {
  return threadIdx.x;
}
DEVICE int block_index() {
  return blockIdx.x;
}
DEVICE int block_count() {
  return gridDim.x;
}
// of the rows that blocks may lie in, see LaunchShape
DEVICE unsigned block_row() {
  return blockIdx.y;
}
DEVICE unsigned block_rows() {
  return gridDim.y;
}

// ---- global memory ----

// for data that the kernel before wrote: past L1
DEVICE uint4 load_16_bytes(const void* p) {
  return __ldcg(static_cast<const uint4*>(p));
}
// for data that does not change while kernels overlap, such as weights; not __ldg, whose loads the
// assembler moves behind `wait_for_kernel_before`
DEVICE uint4 load_16_bytes_constant(const void* p) {
  return *static_cast<const uint4*>(p);
}
// for data that nothing writes while the kernel runs, in kernels that do not start while the one
// before still runs
template <class V>
DEVICE V load_read_only(const V* p) {
  return __ldg(p);
}
DEVICE uint2 load_8_bytes(const void* p) {
  return __ldcg(static_cast<const uint2*>(p));
}
DEVICE uint32_t load_4_bytes(const void* p) {
  return __ldcg(static_cast<const uint32_t*>(p));
}
DEVICE float load_float(const float* p) {
  return __ldcg(p);
}
DEVICE unsigned load_byte(const unsigned char* p) {
  return __ldcg(p);
}
DEVICE void store_byte(unsigned char* p, unsigned v) {
  *p = static_cast<unsigned char>(v);
}
template <class V>
DEVICE void store(V* p, V v) {
  *p = v;
}
DEVICE void store_float(float* p, float v) {
  *p = v;
}
DEVICE void store_16_bytes(void* p, uint4 v) {
  *static_cast<uint4*>(p) = v;
}
DEVICE void store_8_bytes(void* p, uint2 v) {
  *static_cast<uint2*>(p) = v;
}

// ---- asynchronous copies from global to shared memory ----
// Each lane commits groups of copies and waits until at most N of its groups are outstanding; what
// it copied is then visible to itself, and to others after a barrier.

DEVICE void copy_16_bytes_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
// zeros, and no access to `from`, where not `valid`
DEVICE void copy_16_bytes_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_8_bytes_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],8,%2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0)
               : "memory");
}
// The same for memory of which no kernel soon reads this part again (LAST): the L2 cache drops it
// before what the next kernels read.
DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  return policy;
}
template <bool LAST>
DEVICE void copy_16_bytes_async(uint32_t to, const void* from, bool valid) {
  if (!LAST) return copy_16_bytes_async(to, from, valid);
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0],[%1],16,%2,%3;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "l"(evict_first_policy())
               : "memory");
}
template <bool LAST>
DEVICE void copy_8_bytes_async(uint32_t to, const void* from, bool valid) {
  if (!LAST) return copy_8_bytes_async(to, from, valid);
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0],[%1],8,%2,%3;" ::"r"(to), "l"(from),
               "r"(valid ? 8 : 0), "l"(evict_first_policy())
               : "memory");
}
DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- shared memory ----

DEVICE void store_shared(uint32_t a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEVICE void store_shared(uint32_t a, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE void store_shared(uint32_t a, float v) {
  asm volatile("st.shared.f32 [%0],%1;" ::"r"(a), "f"(v) : "memory");
}
DEVICE uint4 load_shared_16_bytes(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}
DEVICE uint2 load_shared_8_bytes(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
  return v;
}
DEVICE float load_shared_float(uint32_t a) {
  float v;
  asm volatile("ld.shared.f32 %0,[%1];" : "=f"(v) : "r"(a) : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit values: lane 8m + r gives the address of row r of matrix m; register
// m of lane (g, t) gets elements 2t and 2t + 1 of row g, or of column g in the transposed form.
DEVICE void load_matrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// ---- the two 16-bit types ----
// `multiply_add`: c[16, 8] += a[16, 16] b[16, 8], accumulated in fp32.

struct BFloat16 {
  static DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  // ones where an element is above zero. Compared as float16: bfloat16 has the same sign bit and
  // zeros, and its largest values, which are NaN as float16, count as above ("u": unordered).
  // Not for negative NaN, of which ReLU leaves none.
  static DEVICE uint32_t positive(uint32_t pair) {
    uint32_t mask;
    asm("set.gtu.u32.f16x2 %0,%1,%2;" : "=r"(mask) : "r"(pair), "r"(0));
    return mask;
  }
  static DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static DEVICE float low(uint32_t pair) {
    float v;
    asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l;}" : "=f"(v) : "r"(pair));
    return v;
  }
  static DEVICE float high(uint32_t pair) {
    float v;
    asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h;}" : "=f"(v) : "r"(pair));
    return v;
  }
  // ones where an element is above zero
  static DEVICE uint32_t positive(uint32_t pair) {
    uint32_t mask;
    asm("set.gt.u32.f16x2 %0,%1,%2;" : "=r"(mask) : "r"(pair), "r"(0));
    return mask;
  }
  static DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// ---- arithmetic ----

DEVICE float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
// max(v, 0) that keeps a NaN, as PyTorch's does: a run that has diverged must not look healthy
DEVICE float relu(float v) {
  asm("max.NaN.f32 %0,%0,0f00000000;" : "+f"(v));
  return v;
}
DEVICE float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
DEVICE uint32_t as_bits(float v) {
  return __float_as_uint(v);
}

// An address that is used in every row: to save registers the compiler would make it from the
// thread index again each time, which is a chain of instructions that the row waits for.
DEVICE uint32_t kept(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// ---- order between lanes, warps and kernels ----

DEVICE float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
DEVICE void warp_barrier() {
  __syncwarp();
}
DEVICE void block_barrier() {
  __syncthreads();
}
// all lanes of WARPS warps that name the same id, 1 .. 15
template <int WARPS>
DEVICE void group_barrier(int id) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "n"(WARPS * 32) : "memory");
}

// Programmatic dependent launch: a kernel may start while the one before it still runs. Before
// `wait_for_kernel_before` it may touch only what no kernel in flight writes.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace cifar_resnet_fast

#endif  // CIFAR_RESNET_FAST_WARP_CUH_
