// The integer linear: the rules that choose format and path, and the paths.
#pragma once

#include "args.h"
#include "format.h"

namespace dllmc {

// Codes of K that share a scale; K itself without groups.
DLLMC_HOST_DEVICE int group_size(const LinearArgs& p) {
  if (p.a_group) return p.a_group;
  return p.w_group ? p.w_group : p.inner;
}
DLLMC_HOST_DEVICE int num_groups(const LinearArgs& p) { return p.inner / group_size(p); }

// Largest M of the small path, and largest group whose sums convert to float32 without an integer-to-float unit.
constexpr int kMaxSmallRows = 64;
constexpr int kMaxGroup = 32768;

inline bool has_int4(const Device& device) { return device.arch >= 80 && device.arch < 90; }

// use(Int4()), use(Int4Wide()), ...: the format that these bits take on this device.
template <class Use>
const char* with_format(const LinearArgs& p, const Device& device, Use use) {
  if (p.w_bits > 4) return use(Int8());
  if (p.a_bits > 4) return use(Int8Int4());
  return has_int4(device) ? use(Int4()) : use(Int4Wide());
}

struct LinearPlan {
  Path path;                          // kNaive, kSmall, kLarge or kHopper
  int32_t tile_tokens, tile_outputs;  // of a block, kLarge only: the other paths choose theirs
  int32_t shared_bytes;               // of a block, kLarge only
};

// The plan of arguments that passed check(); `wanted` kAuto, or the path to force. Null, or why there is no such path.
const char* plan_linear(const LinearArgs&, const Device&, Path wanted, LinearPlan&);

// What run_large() will do.
LinearPlan plan_large(const LinearArgs&, const Device&);

// Arguments passed check(), M > 0, pointers are there and aligned, and the plan chose the path.
const char* run_naive(const LinearArgs&, const Launch&);
const char* run_small(const LinearArgs&, const Launch&);
const char* run_large(const LinearArgs&, const Launch&);
const char* run_hopper(const LinearArgs&, const Launch&);

}  // namespace dllmc
