// Large-M linear on Hopper's background products: weights stay packed until they are in registers.
//
// A block computes 128 outputs x kTokens tokens (256, 128 or 64) in stages of 128 codes of K. Outputs are the rows of
// a product, so that weights are its register operand: 4-bit weights are widened by three logic operations a word,
// right before use. Tokens are its columns, in shared memory, 128 bytes a token and stage.
//   producer   4 warps, each with every fourth stage: packed activations global -> registers -> 8-bit codes -> shared
//              memory, weights by bulk copies of 1 KB; it may run a ring of 4 to 8 stages ahead
//   consumers  2 warpgroups of 64 outputs, a warp one weight tile of 16. Half a stage is a group of two products; two
//              sets of A registers take turns, so that one is filled while the products of the other run. Nothing
//              makes the warpgroups wait for one another: one writes outputs while the other multiplies
// Blocks stay for several tiles, so that the ring is full again when the epilogue ends.
//
// Cycles of a stage on one SM at 256 tokens, Int4Wide (8192 operations a cycle; 128 bytes of shared memory a cycle;
// logic operations take 2 cycles a warp on one of the SM's quarters):
//   products       1024
//   shared memory  896: products read 8 x 8 KB (512), producers write 32 KB (256), weights go in and out (128)
//   logic          288: producers widen 16 words a token (192), consumers 16 an output (96)
//   L2             24 KB, 16 of activations
// At 128 tokens products take 512 and shared memory 512, at 64 tokens 256 and 320: wide tiles first. The epilogue of
// 256 tokens is about 3500 cycles of issue, a tenth of the products of K = 4096.
//
// Order of K in shared memory (format.h: what a lane's weight registers hold): byte 4 t + j of the 32 of product q
// stands at byte 16 t + 8 step + j of the tile, byte 16 + 4 t + j at 16 t + 8 step + 4 + j, with q = 2 step for low
// and 2 step + 1 for high nibbles; for Int8 a step is a product, and a stage is two tiles. So lane t of four that
// share a token writes 8 words, and the lanes of a warp hit 32 banks.
#include <algorithm>

#include "hopper_tile.h"
#include "kernels.h"

namespace dllmc {
namespace {

using namespace hopper;

template <class Format, int kTokens, bool kGrouped>
DLLMC_KERNEL(kThreads, 1)
void linear_hopper(DLLMC_PARAM LinearArgs p) {
  if constexpr (!gpu::kHasWgmma) {
    gpu::trap();
  } else {
    using S = Shared<Format, kTokens>;
    if (gpu::thread() == 0) {
      for (int i = 0; i < S::kStages; ++i) {
        gpu::init_barrier(S::full(i), 1);
        gpu::init_barrier(S::empty(i), kConsumerWarps);
      }
      gpu::publish_barriers();
    }
    gpu::sync_block();
    if (gpu::warp() < kConsumerWarps) {
      gpu::take_registers<kConsumerRegisters>();
      consume<Format, kTokens, kGrouped>(p);
    } else {
      gpu::give_registers<kProducerRegisters>();
      Producer<Format, kTokens>(p).run();
    }
  }
}

int num_tiles(const LinearArgs& p, int tokens) {
  return static_cast<int>((p.rows + tokens - 1) / tokens) * ((p.outputs + kOutputs - 1) / kOutputs);
}

template <class Format, int kTokens, bool kGrouped>
const char* start(const LinearArgs& p, const Launch& launch) {
  const auto blocks = static_cast<unsigned>(std::min(num_tiles(p, kTokens), launch.device.num_sms));
  return gpu::launch(linear_hopper<Format, kTokens, kGrouped>, {blocks}, kThreads, Shared<Format, kTokens>::kBytes,
                     launch.stream, p);
}

// Tokens of a tile: the fewest rounds over the SMs, where a tile costs kExtra tokens more than it has (its weights are
// copied and widened).
int choose_tokens(const LinearArgs& p, const Device& device, bool grouped) {
  constexpr int kExtra = 32;
  int best = 0;
  int64_t least = 0;
  for (const int tokens : {256, 128, 64}) {
    if (grouped && tokens == 256) continue;  // float sums beside integer sums: no registers
    const int64_t rounds = (num_tiles(p, tokens) + device.num_sms - 1) / device.num_sms;
    const int64_t cost = rounds * (tokens + kExtra);
    if (best && cost >= least) continue;
    best = tokens;
    least = cost;
  }
  return best;
}

template <class Format>
const char* start(const LinearArgs& p, const Launch& launch) {
  const bool grouped = num_groups(p) > 1 || p.a_group;
  const int tokens = choose_tokens(p, launch.device, grouped);
  if (grouped) return tokens == 128 ? start<Format, 128, true>(p, launch) : start<Format, 64, true>(p, launch);
  if (tokens == 256) return start<Format, 256, false>(p, launch);
  return tokens == 128 ? start<Format, 128, false>(p, launch) : start<Format, 64, false>(p, launch);
}

}  // namespace

const char* run_hopper(const LinearArgs& p, const Launch& launch) {
  if (p.w_bits > 4) return start<Int8>(p, launch);
  return p.a_bits > 4 ? start<Int8Int4>(p, launch) : start<Int4Wide>(p, launch);
}

}  // namespace dllmc
