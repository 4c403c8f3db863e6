// The few GPU primitives that kernels use, once for nvcc and once (host.h) as plain C++ that runs on a CPU.
//
// A kernel written against this header compiles for every target, and as host C++ it computes the same integers, so
// indices, tile edges, fragment layouts and barriers are tested where there is no GPU.
//
// Fragment layouts of mma (lane = 4 r + t, r 0..7, t 0..3; one register of A or B holds 4 consecutive bytes of K):
//   A 16 rows     a[0] row r, bytes 4t..   a[1] row r+8, bytes 4t..   a[2] row r, bytes 16+4t..   a[3] row r+8, 16+4t..
//   B 8 columns   b[0] column r, bytes 4t..   b[1] column r, bytes 16+4t..
//   D             d[0] row r, column 2t   d[1] row r, column 2t+1   d[2] row r+8, column 2t   d[3] row r+8, column 2t+1
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpu {
struct alignas(16) Vec {  // what one lane loads at once
  uint32_t v[4];
};
}  // namespace gpu

#ifdef DLLMC_HOST
#include "host.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#define DLLMC_DEVICE __device__ __forceinline__
#define DLLMC_HOST_DEVICE __host__ __device__ __forceinline__
// Put before `void name(const __grid_constant__ Args args)`, after template<...>.
#define DLLMC_KERNEL(max_threads, min_blocks) __global__ __launch_bounds__(max_threads, min_blocks)
#define DLLMC_PARAM const __grid_constant__
#define DLLMC_UNROLL _Pragma("unroll")

namespace gpu {

// Which instructions the target being compiled has. A kernel for another target compiles to a trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
constexpr bool kHasInt4 = true;
#else
constexpr bool kHasInt4 = false;
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Where this thread is; blocks are one-dimensional.
DLLMC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DLLMC_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
DLLMC_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31u); }
DLLMC_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }
DLLMC_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DLLMC_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DLLMC_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
DLLMC_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }

// Dynamic shared memory of the block, aligned to 1024 bytes.
DLLMC_DEVICE unsigned char* shared() {
  extern __shared__ __align__(1024) unsigned char dllmc_shared[];
  return dllmc_shared;
}

DLLMC_DEVICE void trap() { __trap(); }
DLLMC_DEVICE void sync_block() { __syncthreads(); }
DLLMC_DEVICE void sync_warp() { __syncwarp(); }
// Barrier `id` (1..8) of `count` threads, whole warps. Its number is part of the instruction: one from a register would
// claim all 16 barriers, and an SM has too few of them for two such blocks.
template <int kId = 1>
DLLMC_DEVICE void sync_some(int id, int count) {
  if constexpr (kId < 8) {
    if (id != kId) return sync_some<kId + 1>(id, count);
  }
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(count) : "memory");
}

template <class T>
DLLMC_DEVICE T shuffle(T value, int from_lane) {
  return __shfl_sync(0xffffffffu, value, from_lane);
}
template <class T>
DLLMC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
DLLMC_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// The same number, but the compiler cannot know: what follows from it is computed where it is used.
DLLMC_DEVICE int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Each operation rounds by itself; the compiler may not fuse a product into a sum.
DLLMC_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DLLMC_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DLLMC_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
DLLMC_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
DLLMC_DEVICE float sqrt(float a) { return __fsqrt_rn(a); }
DLLMC_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DLLMC_DEVICE float rint(float a) { return ::rintf(a); }  // half to even
DLLMC_DEVICE float from_int(int32_t a) { return __int2float_rn(a); }
DLLMC_DEVICE int32_t to_int(float a) { return __float2int_rn(a); }
DLLMC_DEVICE float exp(float a) { return ::expf(a); }
DLLMC_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
DLLMC_DEVICE float min(float a, float b) { return ::fminf(a, b); }
DLLMC_DEVICE float abs(float a) { return ::fabsf(a); }

using Half = __half;
DLLMC_DEVICE float to_float(Half h) { return __half2float(h); }
DLLMC_DEVICE Half to_half(float f) { return __float2half_rn(f); }
// Two halves in one register, the first in the low bits.
DLLMC_DEVICE uint32_t pack_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
DLLMC_DEVICE float low_half(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, 4);
  return __low2float(pair);
}
DLLMC_DEVICE float high_half(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, 4);
  return __high2float(pair);
}

// Four bytes out of the eight of a (0..3) and b (4..7), chosen by the nibbles of `selector`.
DLLMC_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// 16 bytes that are read once: they stay out of L1 and leave L2 first, so that activations stay there.
DLLMC_DEVICE Vec load_once(const void* global) {
  Vec r;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "l"(global), "l"(policy));
  return r;
}
// 16 bytes of a read-only tensor that other blocks read, too.
DLLMC_DEVICE Vec load_shared_reads(const void* global) {
  Vec r;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "l"(global));
  return r;
}

DLLMC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes global -> shared in the background; zeros where not `valid` (then `global` is not read).
DLLMC_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
DLLMC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's latest groups are still under way.
template <int kPending>
DLLMC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices: lane 8 i + j gives the address of row j of matrix i; r[i] holds bytes 4t.. of row r.
DLLMC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with each 8 x 8 matrix of halves transposed.
DLLMC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += A B, A 16 x 64 and B 64 x 8 of 4-bit codes.
DLLMC_DEVICE void mma_int4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  trap();  // elsewhere the assembler would expand it into about 190 instructions
#endif
}
// d += A B, A 16 x 32 and B 32 x 8 of 8-bit codes.
DLLMC_DEVICE void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += A B, A 16 x 16 and B 16 x 8 halves.
DLLMC_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts `kernel` on the stream; null, or why it did not start.
template <class Args>
const char* launch(void (*kernel)(Args), Dim grid, int threads, size_t shared_bytes, void* stream, const Args& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    // The limit belongs to the function: all that a device allows, so that no launch lowers it for another thread's.
    int device = 0, most = 0;
    status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) {
      status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  if (status == cudaSuccess) {
    status = cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(static_cast<unsigned>(threads)), arguments,
                              shared_bytes, static_cast<cudaStream_t>(stream));
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace gpu
#endif
