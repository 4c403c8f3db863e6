// The host half of gpu.h: the same names as plain C++. A block's threads are fibers (host/block.h); what a warp does
// together is done when its last lane arrives, by the fragment layouts of the PTX manual.
//
// Stricter than a GPU where a GPU would let a fault pass unseen: shared memory starts as NaN and ends at a guard page,
// an asynchronous copy leaves 0xA5 until it is waited for, misaligned addresses and divergent warps end the process.
#pragma once

#ifndef DLLMC_HOST
#error "host.h is the host half of gpu.h: build with -DDLLMC_HOST"
#endif

#include <cmath>
#include <cstring>

#include "host/block.h"
#include "host/half.h"

#define DLLMC_DEVICE inline
#define DLLMC_HOST_DEVICE inline
#define DLLMC_KERNEL(max_threads, min_blocks)
#define DLLMC_PARAM const
#define DLLMC_UNROLL

namespace gpu {

// Every path is compiled; the plan chooses by Launch::device.
constexpr bool kHasInt4 = true;
constexpr bool kHasWgmma = true;

using host::Position;

inline host::Block& block() { return *host::running->block; }

inline int thread() { return host::running->index; }
inline int num_threads() { return block().num_threads; }
inline int lane() { return thread() % host::kWarp; }
inline int warp() { return thread() / host::kWarp; }
inline int block_x() { return static_cast<int>(block().index.x); }
inline int block_y() { return static_cast<int>(block().index.y); }
inline int grid_x() { return static_cast<int>(block().grid.x); }
inline int grid_y() { return static_cast<int>(block().grid.y); }

inline unsigned char* shared() { return block().shared(); }

[[noreturn]] inline void trap(Position at = Position::here()) { block().fail("trap at %s:%d", at.file, at.line); }

namespace host {

template <class Operand, class Complete>
void meet_warp(const char* operation, Position at, Operand& operand, Complete complete) {
  running->block->meet(kWarp, operation, at, operand, complete);
}

// `bytes` at a 16-byte aligned address.
inline void expect_aligned(const void* p, const char* what, Position at) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    running->block->fail("%s: address %p at %s:%d is not a multiple of 16", what, p, at.file, at.line);
}
inline void expect_shared(const void* p, const char* what, Position at) {
  expect_aligned(p, what, at);
  if (!running->block->is_shared(p, 16))
    running->block->fail("%s: address %p at %s:%d is not in shared memory", what, p, at.file, at.line);
}

// Until it is waited for, a copy may land at any time, so memory that it covers has no content yet: not what was copied
// earlier, and not what somebody else wrote there, either.
inline void disturb_copies() {
  for (const auto& copy : running->copies) std::memset(copy.shared, 0xA5, 16);
}

}  // namespace host

inline void sync_block(Position at = Position::here()) {
  host::disturb_copies();
  block().barrier(0, block().num_threads, at);
  host::disturb_copies();
}
inline void sync_warp(Position at = Position::here()) {
  int nothing = 0;
  host::disturb_copies();
  host::meet_warp("sync_warp", at, nothing, [](int* const*) {});
}
inline void sync_some(int id, int count, Position at = Position::here()) {
  host::disturb_copies();
  block().barrier(id, count, at);
  host::disturb_copies();
}

template <class T>
T shuffle(T value, int from_lane, Position at = Position::here()) {
  struct Operand {
    T value, result;
    int from;
  } operand = {value, value, from_lane & (host::kWarp - 1)};
  host::meet_warp("shuffle", at, operand, [](Operand* const* lanes) {
    for (int i = 0; i < host::kWarp; ++i) lanes[i]->result = lanes[lanes[i]->from]->value;
  });
  return operand.result;
}
template <class T>
T shuffle_xor(T value, int mask, Position at = Position::here()) {
  return shuffle(value, lane() ^ mask, at);
}
inline uint32_t ballot(bool predicate, Position at = Position::here()) {
  struct Operand {
    bool predicate;
    uint32_t result;
  } operand = {predicate, 0};
  host::meet_warp("ballot", at, operand, [](Operand* const* lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < host::kWarp; ++i) bits |= static_cast<uint32_t>(lanes[i]->predicate) << i;
    for (int i = 0; i < host::kWarp; ++i) lanes[i]->result = bits;
  });
  return operand.result;
}

inline int fresh(int x) { return x; }

inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float div(float a, float b) { return a / b; }
inline float sqrt(float a) { return std::sqrt(a); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float rint(float a) { return std::rint(a); }
inline float from_int(int32_t a) { return static_cast<float>(a); }
inline int32_t to_int(float a) {
  if (std::isnan(a)) return 0;
  if (a >= 0x1p31f) return INT32_MAX;
  return a < -0x1p31f ? INT32_MIN : static_cast<int32_t>(std::rint(a));
}
inline float exp(float a) { return std::exp(a); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float abs(float a) { return std::fabs(a); }

inline uint32_t pack_halves(float low, float high) {
  return to_half(low).bits | static_cast<uint32_t>(to_half(high).bits) << 16;
}
inline float low_half(uint32_t bits) { return to_float(Half{static_cast<uint16_t>(bits & 0xFFFFu)}); }
inline float high_half(uint32_t bits) { return to_float(Half{static_cast<uint16_t>(bits >> 16)}); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (choice & 7u)) & 0xFFu;
    if (choice & 8u) byte = byte & 0x80u ? 0xFFu : 0u;  // the sign, repeated
    result |= byte << 8 * i;
  }
  return result;
}

inline Vec load_once(const void* global, Position at = Position::here()) {
  host::expect_aligned(global, "load_once", at);
  Vec r;
  std::memcpy(&r, global, 16);
  return r;
}
inline Vec load_shared_reads(const void* global, Position at = Position::here()) {
  host::expect_aligned(global, "load_shared_reads", at);
  Vec r;
  std::memcpy(&r, global, 16);
  return r;
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block().shared());
}

inline void copy_async(void* shared, const void* global, bool valid = true, Position at = Position::here()) {
  host::expect_shared(shared, "copy_async to", at);
  host::expect_aligned(global, "copy_async from", at);
  std::memset(shared, 0xA5, 16);
  host::running->copies.push_back({shared, valid ? global : nullptr, host::running->copy_group});
}
inline void commit_copies() { ++host::running->copy_group; }
template <int kPending>
void wait_copies() {
  auto& copies = host::running->copies;
  const int first_pending = host::running->copy_group - kPending;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < first_pending; ++done) {
    if (copies[done].global) {
      std::memcpy(copies[done].shared, copies[done].global, 16);
    } else {
      std::memset(copies[done].shared, 0, 16);
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

namespace host {

struct MatrixOperand {
  uint32_t* r;
  const unsigned char* row;
};

// Element (row, column) of 8 x 8 matrix i as its two bytes; `lanes` hold the row addresses.
inline uint32_t matrix_element(MatrixOperand* const* lanes, int i, int row, int column) {
  const unsigned char* p = lanes[8 * i + row]->row + 2 * column;
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* name, Position at) {
  expect_shared(row, name, at);
  MatrixOperand operand = {r, static_cast<const unsigned char*>(row)};
  meet_warp(name, at, operand, [transposed](MatrixOperand* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        const uint32_t low =
            transposed ? matrix_element(lanes, i, minor, major) : matrix_element(lanes, i, major, minor);
        const uint32_t high =
            transposed ? matrix_element(lanes, i, minor + 1, major) : matrix_element(lanes, i, major, minor + 1);
        lanes[lane]->r[i] = low | high << 16;
      }
    }
  });
}

template <class D>
struct ProductOperand {
  D* d;
  const uint32_t *a, *b;
};

// d += A B of a warp, kElements elements of K in a register, element(register, i) the i-th of them.
template <int kElements, class D, class Sum, class Element>
void multiply(ProductOperand<D>* const* lanes, Element element) {
  constexpr int kInner = 8 * kElements;
  using Factor = decltype(element(0u, 0));
  Factor a[16][kInner], b[8][kInner];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int r = lane / 4, k = lane % 4 * kElements;
    for (int i = 0; i < kElements; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[r][k + half * kInner / 2 + i] = element(lanes[lane]->a[2 * half], i);
        a[r + 8][k + half * kInner / 2 + i] = element(lanes[lane]->a[2 * half + 1], i);
        b[r][k + half * kInner / 2 + i] = element(lanes[lane]->b[half], i);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Factor *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      Sum sum = 0;
      for (int k = 0; k < kInner; ++k) sum += static_cast<Sum>(row[k]) * static_cast<Sum>(column[k]);
      lanes[lane]->d[i] = static_cast<D>(static_cast<Sum>(lanes[lane]->d[i]) + sum);
    }
  }
}

}  // namespace host

inline void load_matrices(uint32_t (&r)[4], const void* row, Position at = Position::here()) {
  host::load_matrices(r, row, false, "load_matrices", at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Position at = Position::here()) {
  host::load_matrices(r, row, true, "load_matrices_transposed", at);
}

inline void mma_int4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Position at = Position::here()) {
  if (block().arch < 80 || block().arch >= 90) {
    block().fail("mma_int4 at %s:%d on compute capability %d, which has none", at.file, at.line, block().arch);
  }
  host::ProductOperand<int32_t> operand = {d, a, b};
  host::meet_warp("mma_int4", at, operand, [](host::ProductOperand<int32_t>* const* lanes) {
    host::multiply<8, int32_t, int64_t>(
        lanes, [](uint32_t x, int i) { return static_cast<int16_t>(static_cast<int32_t>(x << (28 - 4 * i)) >> 28); });
  });
}
inline void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Position at = Position::here()) {
  host::ProductOperand<int32_t> operand = {d, a, b};
  host::meet_warp("mma_int8", at, operand, [](host::ProductOperand<int32_t>* const* lanes) {
    host::multiply<4, int32_t, int64_t>(
        lanes, [](uint32_t x, int i) { return static_cast<int16_t>(static_cast<int8_t>(x >> 8 * i & 0xFFu)); });
  });
}
// The sum of the 16 products is exact to float64 and rounded once; a GPU rounds differently.
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Position at = Position::here()) {
  host::ProductOperand<float> operand = {d, a, b};
  host::meet_warp("mma_half", at, operand, [](host::ProductOperand<float>* const* lanes) {
    host::multiply<2, float, double>(
        lanes, [](uint32_t x, int i) { return to_float(Half{static_cast<uint16_t>(x >> 16 * i & 0xFFFFu)}); });
  });
}

// Runs `kernel` to its end before it returns; null, or why it did not start.
template <class Args>
const char* launch(void (*kernel)(Args), Dim grid, int threads, size_t shared_bytes, void*, const Args& args) {
  const bool fits = grid.x && grid.y && grid.z && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535;
  if (!fits || threads <= 0 || threads > host::kMaxThreads) return "invalid configuration argument";
  auto& block = host::Block::of_this_thread();
  if (shared_bytes > block.max_shared_bytes) return "invalid argument";
  if (threads % host::kWarp) block.fail("a block of %d threads; expected whole warps", threads);
  const auto body = [&] { kernel(args); };
  using Body = decltype(body);
  block.run(grid, threads, shared_bytes, [](const void* state) { (*static_cast<const Body*>(state))(); }, &body);
  return nullptr;
}

}  // namespace gpu
