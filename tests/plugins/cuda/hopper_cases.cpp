// The emulated Hopper: `hopper_cases NAME` makes a product of a warpgroup, right or with one mistake. It exits 0 when
// the product is the textbook one; with a mistake it must not.
//
// Operand B is laid out here by the manual's swizzle of byte offsets (bits 4-6 xor bits 7-9), A and D by its formulas.
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "hopper.h"

namespace {

enum Case {
  kProduct,
  kPhases,
  kNotBegun,
  kAChanged,
  kBChanged,
  kDChanged,
  kDRead,
  kNotPublished,
  kDifferentProducts,
  kNotWaitedFor,
  kRowsNotAligned,
  kNoSwizzle,
  kOneArrivalTooMany,
  kOneArrivalMissing,
  kBytesMissing,
  kTooManyBytes,
  kBulkNotWaitedFor,
  kBulkOfEightBytes,
  kBulkFromOddAddress,
  kNumCases
};

// In the same order.
constexpr const char* kNames[kNumCases] = {
    "product",
    "phases",
    "not_begun",
    "a_changed",
    "b_changed",
    "d_changed",
    "d_read",
    "not_published",
    "different_products",
    "not_waited_for",
    "rows_not_aligned",
    "no_swizzle",
    "one_arrival_too_many",
    "one_arrival_missing",
    "bytes_missing",
    "too_many_bytes",
    "bulk_not_waited_for",
    "bulk_of_eight_bytes",
    "bulk_from_odd_address",
};

constexpr int kStart = 1024, kBulk = 512;  // operand's place in shared memory; bytes of a bulk copy

struct Buffers {
  const int8_t* a;  // [64, 32]
  const int8_t* b;  // [N, 128]
  int32_t* d;       // [64, N]
  int product;      // of the four along b's rows
};

template <int kTokens>
void write_operand(const int8_t* b) {
  for (int offset = gpu::thread() * 4; offset < kTokens * 128; offset += gpu::num_threads() * 4) {
    uint32_t word;
    std::memcpy(&word, b + offset, 4);
    gpu::write_operand(gpu::shared() + kStart + (offset ^ (offset >> 3 & 0x70)), word);
  }
}

gpu::Descriptor operand(Case which, int product) {
  const auto right = gpu::descriptor(gpu::shared() + kStart + (which == kRowsNotAligned ? 512 : 0));
  if (which == kNoSwizzle) return right & ~(gpu::Descriptor{3} << 62);
  return right + 2 * static_cast<unsigned>(which == kDifferentProducts && gpu::thread() == 77 ? product ^ 1 : product);
}

// Three phases of a barrier, each of 128 arrivals and a copy of kBulk bytes.
template <Case kCase>
void meet(const int8_t* global) {
  constexpr int kExpected = kCase == kTooManyBytes ? kBulk - 16 : kCase == kBytesMissing ? kBulk + 16 : kBulk;
  auto* barrier = reinterpret_cast<gpu::Barrier*>(gpu::shared());
  unsigned char* copied = gpu::shared() + 64;
  const bool first = gpu::thread() == 0;
  if (first) gpu::init_barrier(barrier, 128);
  gpu::publish_barriers();
  gpu::sync_block();
  for (uint32_t phase = 0; phase < 3; ++phase) {
    gpu::wait(barrier, ~phase & 1);
    if (first) {
      gpu::expect_bytes(barrier, kExpected);
      gpu::copy_bulk(copied, global + (kCase == kBulkFromOddAddress), kCase == kBulkOfEightBytes ? 8 : kBulk, barrier);
    }
    gpu::sync_block();
    if (copied[3] == static_cast<unsigned char>(global[3])) gpu::trap();  // it is not waited for yet
    gpu::sync_block();
    if (kCase != kOneArrivalMissing || gpu::thread() != 5) gpu::arrive(barrier);
    if (kCase == kOneArrivalTooMany && gpu::thread() == 6) gpu::arrive(barrier);
    gpu::sync_block();
    if (kCase == kBulkNotWaitedFor) return;
    gpu::wait(barrier, phase & 1);
    if (std::memcmp(copied, global, kBulk) != 0) gpu::trap();
    gpu::sync_block();
  }
}

template <Case kCase, int kTokens>
void multiply(const Buffers& p) {
  const int thread = gpu::thread(), row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], p.a + (row + i % 2 * 8) * 32 + i / 2 * 16 + 4 * t, 4);
  int32_t d[kTokens / 2];
  for (int32_t& value : d) value = thread;
  write_operand<kTokens>(p.b);
  if (kCase != kNotPublished) gpu::publish_operand();
  gpu::sync_block();
  if (kCase != kNotBegun) gpu::begin_products();
  gpu::multiply_async(d, a, operand(kCase, p.product), false);
  gpu::multiply_async(d, a, operand(kCase, p.product), true);
  gpu::commit_products();
  if (kCase == kNotWaitedFor) return;
  gpu::sync_block();
  if (kCase == kAChanged && thread == 3) a[2] ^= 1;
  if (kCase == kDChanged && thread == 3) d[1] = 0;
  if (kCase == kBChanged && thread == 3) gpu::shared()[kStart + 5] ^= 1;
  gpu::sync_block();
  if (kCase != kDRead) gpu::wait_products<0>();
  for (int i = 0; i < kTokens / 2; ++i) p.d[(row + i / 2 % 2 * 8) * kTokens + i / 4 * 8 + 2 * t + i % 2] = d[i];
  if (kCase == kDRead) gpu::wait_products<0>();
  if (kCase == kNotPublished) gpu::publish_operand();
}

template <Case kCase, int kTokens>
DLLMC_KERNEL(128, 1)
void kernel(DLLMC_PARAM Buffers p) {
  meet<kCase>(p.b);
  if constexpr (kCase != kPhases) multiply<kCase, kTokens>(p);
}

// Twice the product, by two blocks: the second one finds what the first left under way.
template <Case kCase, int kTokens>
bool is_wrong(int product) {
  std::vector<gpu::Vec> a_memory(64 * 2), b_memory(kTokens * 8 + 1);
  auto *a = reinterpret_cast<int8_t*>(a_memory.data()), *b = reinterpret_cast<int8_t*>(b_memory.data());
  uint32_t state = 12345;
  const auto random = [&] { return static_cast<int8_t>((state = state * 1664525u + 1013904223u) >> 24); };
  for (int i = 0; i < 64 * 32; ++i) a[i] = random();
  for (int i = 0; i < kTokens * 128; ++i) b[i] = random();
  std::vector<int32_t> d(64 * kTokens, -1);
  const Buffers buffers{a, b, d.data(), product};
  if (const char* reason = gpu::launch(kernel<kCase, kTokens>, {2}, 128, kStart + kTokens * 128, nullptr, buffers)) {
    return std::printf("did not start: %s\n", reason);
  }
  int wrong = 0;
  for (int row = 0; row < 64; ++row) {
    for (int token = 0; token < kTokens; ++token) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row * 32 + k] * b[token * 128 + product * 32 + k];
      wrong += d[static_cast<size_t>(row * kTokens + token)] != (kCase == kPhases ? -1 : 2 * sum);
    }
  }
  if (wrong) std::printf("%d of %d wrong with %d tokens, product %d\n", wrong, 64 * kTokens, kTokens, product);
  return wrong;
}

template <Case kCase>
bool is_wrong() {
  bool wrong = false;
  for (int product = 0; product < 4; ++product) {
    wrong |= is_wrong<kCase, 64>(product);
    if (kCase == kProduct) wrong |= is_wrong<kCase, 128>(product) || is_wrong<kCase, 256>(product);
  }
  return wrong;
}

template <int... kCases>
int run(int which, std::integer_sequence<int, kCases...>) {
  constexpr bool (*kRuns[])() = {is_wrong<static_cast<Case>(kCases)>...};
  return kRuns[which]();
}

}  // namespace

int main(int count, char** words) {
  // The manual's fields: address / 16 in bits 0-13, 1 in 16-29, 1024 / 16 in 32-45, 1 in 62-63.
  static_assert(gpu::descriptor_at(0x27C00) == 0x40000040000127C0u, "descriptor");
  for (int i = 0; i < kNumCases; ++i) {
    if (count == 2 && std::strcmp(words[1], kNames[i]) == 0) {
      return run(i, std::make_integer_sequence<int, kNumCases>());
    }
  }
  return std::printf("expected the name of a case\n"), 2;
}
