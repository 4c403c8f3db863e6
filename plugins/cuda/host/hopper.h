// The host half of hopper.h. Everything that a GPU does in the background is done as late as it may be, at the wait for
// it, and what is under way is poisoned or compared, so that a missing wait or an early overwrite ends the process:
//   bulk copy      leaves 0xA5 until somebody waits for its barrier
//   operand word   leaves 0xA5 until its thread's publish_operand()
//   product        D holds kPoison until the wait; A, B and D must then be as they were at the issue
#pragma once

#ifndef DLLMC_HOST
#error "host/hopper.h is the host half of hopper.h: build with -DDLLMC_HOST"
#endif

#include <algorithm>
#include <utility>
#include <vector>

#include "../gpu.h"

#define DLLMC_ROLL

namespace gpu {
namespace host {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int32_t kPoison = INT32_MIN + 0x5A5A;

// What the 8 bytes of a barrier hold.
struct BarrierState {
  uint16_t arrivals, missing;
  int32_t bytes_and_parity;  // 2 * bytes to come + parity of the current phase

  int parity() const { return bytes_and_parity & 1; }
  void end_phase_if_complete() {
    if (missing || bytes_and_parity >> 1) return;
    missing = arrivals;
    bytes_and_parity ^= 1;
  }
};
static_assert(sizeof(BarrierState) == sizeof(gpu::Barrier), "a barrier has 8 bytes");

struct BulkCopy {
  void* shared;
  const void* global;
  int bytes;
  BarrierState* barrier;
};

struct Product {
  const uint32_t* a;
  uint32_t a_at_issue[4];
  Descriptor b;
  bool accumulate;
  int group;
};

// What a thread has under way.
struct Background {
  std::vector<std::pair<unsigned char*, uint32_t>> words;
  std::vector<Product> products;
  std::vector<std::vector<int8_t>> operands;  // B of each product at its issue, first thread of a warpgroup only
  int32_t* d = nullptr;                       // the accumulator under way and its values
  std::vector<int32_t> sums;
  int groups = 0;
  bool begun = false;
};

struct Hopper {
  std::vector<BulkCopy> copies;
  Background threads[kMaxThreads];

  static Hopper& of_this_thread() {
    static thread_local const auto hopper = std::make_unique<Hopper>();  // as large as a block
    return *hopper;
  }
  static Background& own() { return of_this_thread().threads[running->index]; }

  // What the last block left behind was never waited for.
  void expect_idle(Position at) const {
    if (!copies.empty()) running->block->fail("at %s:%d: a block ended with bulk copies under way", at.file, at.line);
    for (const Background& thread : threads) {
      if (thread.products.empty() && thread.words.empty()) continue;
      running->block->fail("at %s:%d: a block ended with products or operands under way", at.file, at.line);
    }
  }
};

inline BarrierState* state_of(gpu::Barrier* barrier, const char* what, Position at) {
  Block& block = *running->block;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 || !block.is_shared(barrier, 8)) {
    block.fail("%s at %s:%d: %p is no barrier's address", what, at.file, at.line, static_cast<void*>(barrier));
  }
  return reinterpret_cast<BarrierState*>(barrier);
}

// Copies of this barrier come in once all its arrivals have.
inline void deliver(BarrierState* barrier) {
  auto& copies = Hopper::of_this_thread().copies;
  const auto mine = std::stable_partition(copies.begin(), copies.end(),
                                          [&](const BulkCopy& copy) { return copy.barrier != barrier; });
  for (auto copy = mine; copy != copies.end(); ++copy) {
    std::memcpy(copy->shared, copy->global, static_cast<size_t>(copy->bytes));
    barrier->bytes_and_parity -= 2 * copy->bytes;
  }
  copies.erase(mine, copies.end());
  if (barrier->bytes_and_parity < 0) running->block->fail("a barrier got more bytes than it expects");
  barrier->end_phase_if_complete();
}

// Operand B by the PTX manual's matrix descriptor and its canonical K-major layouts: row n of the operand stands
// (n / 8) * stride + (n % 8) * 128 bytes on, and address bits 4-6 are exchanged by xor with bits 7-9.
inline std::vector<int8_t> read_operand(Descriptor b, int tokens, Position at) {
  const auto field = [b](int first, int bits) { return static_cast<uint32_t>(b >> first & ((1u << bits) - 1)); };
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  const Block& block = *running->block;
  if (field(62, 2) != 1 || field(49, 3) != 0) {
    block.fail("product at %s:%d: swizzle %u, base offset %u; expected 1 and 0", at.file, at.line, field(62, 2),
               field(49, 3));
  }
  if (start % 1024 >= 128) {
    block.fail("product at %s:%d: operand at %#x, expected its rows at a multiple of 1024", at.file, at.line, start);
  }
  std::vector<int8_t> values(static_cast<size_t>(tokens) * 32);
  for (int n = 0; n < tokens; ++n) {
    for (uint32_t k = 0; k < 32; ++k) {
      const uint32_t logical = start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8) * 128 + k;
      const unsigned char* p = block.shared() + (logical ^ (logical >> 7 & 7) << 4);
      if (!block.is_shared(p, 1)) block.fail("product at %s:%d: operand behind shared memory", at.file, at.line);
      values[static_cast<size_t>(n) * 32 + k] = static_cast<int8_t>(*p);
    }
  }
  return values;
}

// Product `i` of the warpgroup whose first thread is `first`.
inline void execute(Background* first, size_t i, Position at) {
  const Block& block = *running->block;
  const Product& one = first[0].products[i];
  const int tokens = static_cast<int>(first[0].sums.size()) * 2;
  int8_t a[64][32];
  for (int thread = 0; thread < kGroup; ++thread) {
    const Product& product = first[thread].products[i];
    if (product.b != one.b || product.accumulate != one.accumulate || product.group != one.group) {
      block.fail("wait at %s:%d: threads of a warpgroup issued different products", at.file, at.line);
    }
    if (std::memcmp(product.a, product.a_at_issue, 16) != 0) {
      block.fail("wait at %s:%d: registers of A were changed before it", at.file, at.line);
    }
    const int row = thread / 32 * 16 + thread % 32 / 4, k = thread % 4 * 4;
    for (int reg = 0; reg < 4; ++reg) std::memcpy(&a[row + reg % 2 * 8][k + reg / 2 * 16], &product.a[reg], 4);
  }
  const std::vector<int8_t> b = read_operand(one.b, tokens, at);
  if (b != first[0].operands[i]) block.fail("wait at %s:%d: operand B was changed before it", at.file, at.line);
  for (int thread = 0; thread < kGroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int j = 0; j < tokens / 2; ++j) {
      const int8_t *x = a[row + j / 2 % 2 * 8], *y = &b[static_cast<size_t>(j / 4 * 8 + column + j % 2) * 32];
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += x[k] * y[k];
      int32_t& d = first[thread].sums[static_cast<size_t>(j)];
      d = static_cast<int32_t>(static_cast<uint32_t>(sum) + (one.accumulate ? static_cast<uint32_t>(d) : 0u));
    }
  }
}

// The products of all groups but the latest `pending`, and D if none is under way any more.
inline void finish(Background* first, int pending, Position at) {
  const auto old = [&](const Product& product) { return product.group < first[0].groups - pending; };
  size_t done = 0;
  for (; done < first[0].products.size() && old(first[0].products[done]); ++done) execute(first, done, at);
  for (int thread = 0; thread < kGroup; ++thread) {
    Background& own = first[thread];
    own.products.erase(own.products.begin(), own.products.begin() + static_cast<std::ptrdiff_t>(done));
    if (!own.d || !own.products.empty()) continue;
    for (size_t i = 0; i < own.sums.size(); ++i) {
      if (own.d[i] != kPoison) running->block->fail("wait at %s:%d: D was changed before it", at.file, at.line);
      own.d[i] = own.sums[i];
    }
    own.d = nullptr;
  }
  first[0].operands.erase(first[0].operands.begin(), first[0].operands.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace host

inline Descriptor descriptor(const void* operand) { return descriptor_at(shared_address(operand)); }

inline void init_barrier(Barrier* barrier, int arrivals, Position at = Position::here()) {
  host::Hopper::of_this_thread().expect_idle(at);
  *host::state_of(barrier, "init_barrier", at) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier, Position at = Position::here()) {
  host::BarrierState* state = host::state_of(barrier, "arrive", at);
  if (state->missing == 0) block().fail("arrive at %s:%d: nobody is missing", at.file, at.line);
  --state->missing;
  state->end_phase_if_complete();
  if (state->missing < state->arrivals) return;
  bool others_ran = false;  // those that waited for this phase go on before the last to arrive does
  host::wait_until([&] { return std::exchange(others_ran, true); }, "arrive", at);
}
inline void expect_bytes(Barrier* barrier, int bytes, Position at = Position::here()) {
  host::state_of(barrier, "expect_bytes", at)->bytes_and_parity += 2 * bytes;
}
inline void wait(Barrier* barrier, uint32_t parity, Position at = Position::here()) {
  host::BarrierState* state = host::state_of(barrier, "wait", at);
  host::wait_until(
      [&] {
        if (state->parity() == static_cast<int>(parity) && state->missing == 0) host::deliver(state);
        return state->parity() != static_cast<int>(parity);
      },
      "wait", at);
}

inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier, Position at = Position::here()) {
  host::expect_shared(shared, "copy_bulk to", at);
  host::expect_aligned(global, "copy_bulk from", at);
  if (bytes <= 0 || bytes % 16 || !block().is_shared(shared, static_cast<size_t>(bytes))) {
    block().fail("copy_bulk at %s:%d: %d bytes", at.file, at.line, bytes);
  }
  std::memset(shared, 0xA5, static_cast<size_t>(bytes));
  host::Hopper::of_this_thread().copies.push_back({shared, global, bytes, host::state_of(barrier, "copy_bulk", at)});
}
inline void prefetch_bulk(const void* global, int bytes, Position at = Position::here()) {
  host::expect_aligned(global, "prefetch_bulk", at);
  if (bytes <= 0 || bytes % 16) block().fail("prefetch_bulk at %s:%d: %d bytes", at.file, at.line, bytes);
}

inline void write_operand(void* shared, uint32_t word, Position at = Position::here()) {
  auto* p = static_cast<unsigned char*>(shared);
  if (reinterpret_cast<uintptr_t>(p) % 4 || !block().is_shared(p, 4)) {
    block().fail("write_operand at %s:%d: address %p", at.file, at.line, shared);
  }
  std::memset(p, 0xA5, 4);
  host::Hopper::own().words.emplace_back(p, word);
}
inline void publish_operand() {
  auto& words = host::Hopper::own().words;
  for (const auto& [p, word] : words) std::memcpy(p, &word, 4);
  words.clear();
}

inline void begin_products() { host::Hopper::own().begun = true; }
template <int kSums>
void multiply_async(int32_t (&d)[kSums], const uint32_t (&a)[4], Descriptor b, bool accumulate,
                    Position at = Position::here()) {
  host::Background& own = host::Hopper::own();
  if (!own.begun) block().fail("product at %s:%d: begin_products() is missing", at.file, at.line);
  if (own.d && own.d != d) block().fail("product at %s:%d: another accumulator is under way", at.file, at.line);
  if (!own.d) {
    own.d = d;
    own.sums.assign(d, d + kSums);
    std::fill(d, d + kSums, host::kPoison);
  }
  own.products.push_back({a, {a[0], a[1], a[2], a[3]}, b, accumulate, own.groups});
  if (thread() % host::kGroup == 0) own.operands.push_back(host::read_operand(b, 2 * kSums, at));
}
inline void commit_products() {
  ++host::Hopper::own().groups;
  host::Hopper::own().begun = false;
}
template <int kPending>
void wait_products(Position at = Position::here()) {
  int nothing = 0;
  const int first = thread() / host::kGroup * host::kGroup;
  block().meet(host::kGroup, "wait_products", at, nothing,
               [&](int* const*) { host::finish(host::Hopper::of_this_thread().threads + first, kPending, at); });
}
template <class T, int kCount>
void settle(T (&)[kCount]) {}
template <class T>
void settle(T*&) {}

inline float reciprocal(float x) { return x > 0x1p126f ? 0.0f : 1.0f / x; }

template <int kCount>
void give_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg");
}
template <int kCount>
void take_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "setmaxnreg");
}

}  // namespace gpu
