// What only Hopper (sm_90a) has: barriers in shared memory that count bytes, bulk copies, and products of a warpgroup
// (4 warps, 128 threads) that run in the background with one operand in registers and the other in shared memory.
//
// A product is D += A B, A 64 outputs x 32 codes, B 32 codes x N tokens, all of 8 bits:
//   A   registers as in gpu.h's mma of 16 rows; warp w of the group holds rows 16 w to 16 w + 15
//   B   token n is a row of 128 bytes; the 16-byte chunk c of row n stands at chunk c ^ (n % 8) ("128-byte swizzle",
//       K-major), so that neither writing nor reading meets a bank conflict; rows start at a multiple of 1024 bytes
//   D   N / 8 times the D of an mma of 8 columns
// From the issue of a product to the wait for its group nobody may touch A, B or D. host/hopper.h is the host half; it
// ends the process when somebody does.
#pragma once

#include "gpu.h"

namespace gpu {

// Counts arrivals and bytes of bulk copies; a phase ends when none is missing. Phases alternate in parity, from 0.
using Barrier = uint64_t;

// Operand B in shared memory. Adding step << 1 moves it by 32 codes within the rows' 128 bytes.
using Descriptor = uint64_t;

constexpr int kSwizzleRows = 8, kSwizzleBytes = 1024;  // the pattern repeats every 8 rows of 128 bytes

// Fields: address / 16 in bits 0-13, leading offset in 16-29 (unused with a swizzle), distance of 8 rows / 16 in 32-45,
// 1 for the 128-byte swizzle in 62-63.
DLLMC_HOST_DEVICE constexpr Descriptor descriptor_at(uint32_t shared_address) {
  return static_cast<Descriptor>((shared_address & 0x3FFFFu) >> 4) | Descriptor{1} << 16 |
         Descriptor{kSwizzleBytes >> 4} << 32 | Descriptor{1} << 62;
}

}  // namespace gpu

#ifdef DLLMC_HOST
#include "host/hopper.h"
#else

// Before a loop whose iterations must not be computed ahead: their addresses would not fit into registers.
#define DLLMC_ROLL _Pragma("unroll 1")

namespace gpu {

DLLMC_DEVICE Descriptor descriptor(const void* operand) { return descriptor_at(shared_address(operand)); }

// One thread makes a barrier whose phases wait for `arrivals`; publish_barriers() and sync_block() show it to others.
DLLMC_DEVICE void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DLLMC_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DLLMC_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The current phase also waits for `bytes` of bulk copies.
DLLMC_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity has ended; on a fresh barrier the phase of parity 1 has.
DLLMC_DEVICE void wait(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// `bytes` (a multiple of 16) global -> shared in the background; `barrier` counts them.
DLLMC_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Writes 4 bytes of an operand B. They are there for products of others after this thread's publish_operand().
DLLMC_DEVICE void write_operand(void* shared, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared_address(shared)), "r"(word) : "memory");
}
DLLMC_DEVICE void publish_operand() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders the registers' writes before the products that follow. Needed before each group of products.
DLLMC_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DLLMC_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` of the latest groups are still under way.
template <int kPending>
DLLMC_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After a wait: the compiler may not read or reuse these registers before it.
template <class T, int kCount>
DLLMC_DEVICE void settle(T (&registers)[kCount]) {
  DLLMC_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
// From here on a pointer to global memory is a register of its own, to which offsets are added.
template <class T>
DLLMC_DEVICE void settle(T*& pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
}

// multiply_async(d, a, b, accumulate): d += A B, or d = A B; d has N / 2 registers for N = 64, 128, 256 tokens.
// An operand list cannot be a template's, so macros count the registers.
#define DLLMC_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define DLLMC_D16(i) DLLMC_D4(i), DLLMC_D4(i + 4), DLLMC_D4(i + 8), DLLMC_D4(i + 12)
#define DLLMC_D32(i) DLLMC_D16(i), DLLMC_D16(i + 16)
#define DLLMC_D64(i) DLLMC_D32(i), DLLMC_D32(i + 32)
#define DLLMC_D128(i) DLLMC_D64(i), DLLMC_D64(i + 64)
#define DLLMC_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define DLLMC_WGMMA(tokens, names, operands, a0, a1, a2, a3, b, scale)                                         \
  DLLMC_DEVICE void multiply_async(int32_t (&d)[tokens / 2], const uint32_t (&a)[4], Descriptor descriptor_b, \
                                   bool accumulate) {                                                         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #scale ", 0; wgmma.mma_async.sync.aligned.m64n" #tokens     \
                 "k32.s32.s8.s8 {" names "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p; }"              \
                 : operands                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b),                             \
                   "r"(static_cast<int>(accumulate)));                                                        \
  }
DLLMC_WGMMA(64, DLLMC_TEN() DLLMC_TEN(1) DLLMC_TEN(2) "%30,%31", DLLMC_D32(0), 32, 33, 34, 35, 36, 37)
DLLMC_WGMMA(128,
            DLLMC_TEN() DLLMC_TEN(1) DLLMC_TEN(2) DLLMC_TEN(3) DLLMC_TEN(4) DLLMC_TEN(5) "%60,%61,%62,%63",
            DLLMC_D64(0), 64, 65, 66, 67, 68, 69)
DLLMC_WGMMA(256,
            DLLMC_TEN() DLLMC_TEN(1) DLLMC_TEN(2) DLLMC_TEN(3) DLLMC_TEN(4) DLLMC_TEN(5) DLLMC_TEN(6) DLLMC_TEN(7)
                DLLMC_TEN(8) DLLMC_TEN(9) DLLMC_TEN(10) DLLMC_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127",
            DLLMC_D128(0), 128, 129, 130, 131, 132, 133)
#undef DLLMC_WGMMA
#undef DLLMC_TEN
#undef DLLMC_D128
#undef DLLMC_D64
#undef DLLMC_D32
#undef DLLMC_D16
#undef DLLMC_D4

// Asks for `bytes` (a multiple of 16) of global memory to be brought into L2.
DLLMC_DEVICE void prefetch_bulk(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// 1 / x to one unit in the last place, 0 for x above 2^126.
DLLMC_DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Registers a thread of this warpgroup may use from here on; a block's sum may not exceed what it started with.
template <int kCount>
DLLMC_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DLLMC_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace gpu
#endif
