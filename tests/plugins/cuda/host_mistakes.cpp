// What the emulated GPU must not let pass: `host_mistakes NAME` runs a kernel with one mistake and must not return.
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include "gpu.h"

namespace {

enum Mistake {
  kLaneLeavesItsWarp,
  kTwoOperations,
  kTwoBranches,
  kBarrierNotReached,
  kBarrierOfTwoCounts,
  kHalfAWarpAtABarrier,
  kTrap,
  kMisalignedLoad,
  kMisalignedCopy,
  kCopyToGlobal,
  kWriteBehindShared,
  kWriteJustBeforeShared,
  kWaitForEver,
  kMisalignedVector,
  kWritePastTheGuard,
  kWriteBeforeShared,
  kNumMistakes
};

// In the same order.
constexpr const char* kNames[kNumMistakes] = {
    "lane_leaves_its_warp",
    "two_operations",
    "two_branches",
    "barrier_not_reached",
    "barrier_of_two_counts",
    "half_a_warp_at_a_barrier",
    "trap",
    "misaligned_load",
    "misaligned_copy",
    "copy_to_global",
    "write_behind_shared",
    "write_just_before_shared",
    "wait_for_ever",
    "misaligned_vector",
    "write_past_the_guard",
    "write_before_shared",
};

constexpr size_t kSharedBytes = 1000;  // 24 bytes before the guard page

struct Buffers {
  uint32_t* in;
  uint32_t* out;
};

template <Mistake kMistake>
DLLMC_KERNEL(64, 1)
void mistake(DLLMC_PARAM Buffers args) {
  auto* shared = reinterpret_cast<uint32_t*>(gpu::shared());
  uint32_t value = args.in[gpu::thread()];
  const bool odd_one = gpu::thread() == 37;
  if constexpr (kMistake == kLaneLeavesItsWarp) {
    if (odd_one) return;
    value = gpu::shuffle(value, 0);
  } else if constexpr (kMistake == kTwoOperations) {
    value = odd_one ? gpu::ballot(true) : gpu::shuffle(value, 0);
  } else if constexpr (kMistake == kTwoBranches) {
    if (odd_one) {
      value = gpu::shuffle(value, 1);
    } else {
      value = gpu::shuffle(value, 0);
    }
  } else if constexpr (kMistake == kBarrierNotReached) {
    if (!odd_one) gpu::sync_block();
  } else if constexpr (kMistake == kBarrierOfTwoCounts) {
    gpu::sync_some(1, gpu::warp() ? 32 : 64);
  } else if constexpr (kMistake == kHalfAWarpAtABarrier) {
    gpu::sync_some(gpu::lane() < 16 ? 1 : 2, 32);
  } else if constexpr (kMistake == kTrap) {
    gpu::trap();
  } else if constexpr (kMistake == kMisalignedLoad) {
    if (odd_one) value = gpu::load_once(args.in + 1).v[0];
  } else if constexpr (kMistake == kMisalignedCopy) {
    gpu::copy_async(shared + 4 * gpu::lane() + 1, args.in);
  } else if constexpr (kMistake == kCopyToGlobal) {
    gpu::copy_async(args.out, args.in);
  } else if constexpr (kMistake == kWriteBehindShared) {
    if (odd_one) shared[250] = 1;
  } else if constexpr (kMistake == kWaitForEver) {
    gpu::host::wait_until([&] { return value == 12345; }, "a value that never comes");
  } else if constexpr (kMistake == kMisalignedVector) {
    if (odd_one) value = reinterpret_cast<const gpu::Vec*>(args.in + 1)->v[2];
  } else if constexpr (kMistake == kWriteJustBeforeShared) {
    if (odd_one) shared[-38] = 1;
  } else if constexpr (kMistake == kWritePastTheGuard) {
    if (odd_one) shared[256] = 1;
  } else if constexpr (kMistake == kWriteBeforeShared) {
    if (odd_one) shared[-1024] = 1;
  }
  args.out[gpu::thread()] = value;
}

template <int... kMistakes>
int run(int which, std::integer_sequence<int, kMistakes...>) {
  constexpr void (*kKernels[])(Buffers) = {mistake<static_cast<Mistake>(kMistakes)>...};
  static std::array<gpu::Vec, 64> in = {}, out = {};
  const char* reason = gpu::launch(kKernels[which], {1}, 64, kSharedBytes, nullptr, Buffers{in[0].v, out[0].v});
  return std::printf("the mistake passed; %s\n", reason ? reason : "no reason"), 0;
}

}  // namespace

int main(int count, char** words) {
  for (int i = 0; i < kNumMistakes; ++i) {
    if (count == 2 && std::strcmp(words[1], kNames[i]) == 0) {
      return run(i, std::make_integer_sequence<int, kNumMistakes>());
    }
  }
  return std::printf("expected the name of a mistake\n"), 2;
}
