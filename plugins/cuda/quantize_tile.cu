// DllmcQuantize with a Kronecker transform, and TAC by blocks of 16, to at most 4 bits: products of halves.
//
// Tile: a team of warps owns a token (a x b); a block has 1 to 8 teams. Stage 1, tile <- tile right: a warp owns strips
// of 16 rows, in place. Stage 2, z = left^T tile: a warp owns kStrips strips of 16 columns and keeps all of z in
// registers through gate, extremes, scale and codes, so nothing is rounded to a half after it, and a token takes only
// two team barriers more than a row without a transform. TAC runs between load and stage 1, all teams together.
// Codes: neighbouring columns of a lane make a byte; a quad swaps bytes so that each lane stores 4 (2 where 8 does not
// divide b).
// Factors: halves in operand order, 16 bytes a lane and no bank twice, in shared memory for as long as the block lives
// (it walks through the tokens). Where both do not fit (128 x 148 in 99 KB) they take turns in one buffer and come from
// L2, where a kernel before this one arranged them.
// Two strips a warp: an operand that was loaded once serves both, which halves what shared memory sends; with one, it
// would be the limit for 96 x 128 on large GPUs, and not DRAM. One strip a warp where rows are few and latency counts.
// Latency: a row's loads are all issued at once (32 to 96 values a thread); teams, and the 2 or more blocks of an SM,
// do not wait for each other, so that one computes while another loads.
// Halves: a row is scaled by a power of two to a peak in [1, 2), and between the stages by another one (`lift`) that b
// and the largest |right| bound, so nothing overflows; the scale takes both back. What is rounded to a half: the row
// (exact if x is float16 and nothing multiplies it), right, the tile between the stages, left; with TAC its result.
#include "kernels.h"
#include "quantize_tile_codes.h"

namespace dllmc {
namespace {

constexpr int kArrangeThreads = 256, kArrangeBlocks = 16;

// What a thread needs to know of the block's shared memory.
struct Memory {
  TileShared* head;
  gpu::Vec *right, *left;  // the same place where the factors take turns
  unsigned char *tiles, *groups;
};
DLLMC_DEVICE Memory find_memory(const TileArgs& p) {
  unsigned char* base = gpu::shared();
  gpu::Vec* right = reinterpret_cast<gpu::Vec*>(base + sizeof(TileShared));
  gpu::Vec* left = p.operands ? right : right + p.b_tiles * p.b_tiles * 32;
  return {reinterpret_cast<TileShared*>(base), right, left, base + p.tiles_at, base + p.groups_at};
}

// The next factor into the buffer that both use.
DLLMC_DEVICE void fetch_operands(const TileArgs& p, gpu::Vec* to, bool is_left) {
  const int skipped = is_left ? p.b_tiles * p.b_tiles * 32 : 0, tiles = is_left ? p.a_tiles : p.b_tiles;
  for (int i = gpu::thread(); i < tiles * tiles * 32; i += gpu::num_threads()) {
    gpu::copy_async(to + i, p.operands + skipped + i);
  }
  gpu::commit_copies();
}

// Factors, zeros around the tokens, and peaks that hold for all rows; contains the block's barrier.
DLLMC_DEVICE void set_up(const TileArgs& p, const Memory& memory) {
  const int thread = gpu::thread(), threads = gpu::num_threads();
  float right_peak = 0.0f, bias_peak = 0.0f;
  if (p.operands) {
    for (int i = thread; i < p.num_peaks; i += threads) right_peak = gpu::max(right_peak, p.peaks[i]);
  } else {
    right_peak = arrange_factor(p.q.right, p.q.right_size, p.b_tiles, false, memory.right, thread, threads);
    arrange_factor(p.q.left, p.q.left_size, p.a_tiles, true, memory.left, thread, threads);
  }
  if (p.q.tac_block) {
    for (int k = thread; k < p.q.inner; k += threads) bias_peak = gpu::max(bias_peak, gpu::abs(p.q.tac_bias[k]));
  }
  for (int i = thread; i < p.tokens * p.token_bytes / 16; i += threads)
    reinterpret_cast<gpu::Vec*>(memory.tiles)[i] = {};
  right_peak = reduce_max(right_peak);
  bias_peak = reduce_max(bias_peak);
  if (gpu::lane() == 0) {
    memory.head->right_peak[gpu::warp()] = right_peak;
    memory.head->bias_peak[gpu::warp()] = bias_peak;
  }
  gpu::sync_block();
}

// The power of two between the stages: |tile right| <= peak b max |right| stays below 2^15.
DLLMC_DEVICE float find_lift(const TileArgs& p, const TileShared& s, const Team& team) {
  const int lane = team.lane, warps = gpu::num_threads() / 32;
  float peak = 2.0f;
  if (p.q.tac_block) peak = reduce_max(lane < warps ? s.compensated_peak[lane][team.index] : 0.0f);
  const float right = reduce_max(lane < warps ? s.right_peak[lane] : 0.0f);
  const float bound = gpu::mul(gpu::mul(peak, right), gpu::from_int(p.q.right_size));
  return power_of_two(clamp(268 - biased_exponent(bound), 1, 253));
}

// Stages and grid of a token whose halves stand in `tile`.
template <int kATiles, int kBTiles, int kStrips>
DLLMC_DEVICE void finish_token(const TileArgs& p, const Memory& memory, const Team& team, int64_t m,
                               unsigned char* tile) {
  TeamShared& shared = memory.head->teams[team.index];
  const float lift = find_lift(p, *memory.head, team);
  if (p.operands) gpu::wait_copies<0>();
  team.sync();
  const float unscale = gpu::mul(shared.unscale, power_of_two(254 - biased_exponent(lift)));
  multiply_right<kBTiles, kStrips>(p, team.again(), memory.right, lift, tile);
  team.sync();
  if (p.operands) {
    fetch_operands(p, memory.left, true);
    gpu::wait_copies<0>();
    team.sync();
  }
  Sums<kATiles, kStrips> z = {};
  multiply_left<kATiles, kStrips>(p, team.again(), memory.left, tile, z);
  if (p.q.state) gate<kATiles, kStrips>(p.q, team.again(), m, z);
  GroupGrid row_grid = {};
  const GroupGrid* groups = nullptr;
  if (p.q.a_group) {
    unsigned char* own = memory.groups + team.index * p.group_bytes;
    groups = find_group_grids<kATiles, kStrips>(p, own, team.again(), m, unscale, z);
  } else {
    row_grid = find_row_grid<kATiles, kStrips>(p.q, shared, team.again(), m, unscale, z);
  }
  store_codes<kATiles, kStrips>(p, team.again(), m, row_grid, groups, z);
}

// kLoads: of a float32 row that a thread has registers for, a divisor of 2 kATiles kStrips.
template <int kATiles, int kBTiles, int kStrips, int kMaxThreads, int kBlocks, int kLoads>
DLLMC_KERNEL(kMaxThreads, kBlocks)
void quantize_tile(DLLMC_PARAM TileArgs p) {
  constexpr int kValues = 8 * kATiles * kStrips;  // of a row in a thread: a b / (32 ceil(b / 16 / kStrips)) at most
  const Memory memory = find_memory(p);
  const int index = gpu::warp() / p.team_warps, warp = gpu::warp() % p.team_warps;
  unsigned char* tile = memory.tiles + index * p.token_bytes;
  set_up(p, memory);
  for (int group = gpu::block_x(); group * p.tokens < p.rows; group += gpu::grid_x()) {
    const int m = group * p.tokens + index;
    const Team team = {index, p.team_warps, gpu::fresh(warp), gpu::fresh(gpu::lane())};
    if (p.operands) fetch_operands(p, memory.right, false);
    if (m < p.rows) {
      if (p.q.x_type == Type::kFloat32) {
        load_token<4, kLoads, kValues / 4 / kLoads>(p, *memory.head, team, m, tile);
      } else {
        load_token<8, kValues / 8, 1>(p, *memory.head, team, m, tile);
      }
    }
    if (p.q.tac_block) {
      gpu::sync_block();
      compensate(p, *memory.head, memory.tiles);
      gpu::sync_block();
    }
    if (m < p.rows) finish_token<kATiles, kBTiles, kStrips>(p, memory, team, m, tile);
  }
}

// Operands of both factors for kernels whose blocks cannot keep them, and the largest |right| of each block.
struct ArrangeArgs {
  QuantizeArgs q;
  int32_t a_tiles, b_tiles;
  gpu::Vec* operands;
  float* peaks;
};

DLLMC_KERNEL(kArrangeThreads, 1)
void arrange_factors(DLLMC_PARAM ArrangeArgs p) {
  float* warp_peaks = reinterpret_cast<float*>(gpu::shared());
  const int first = gpu::block_x() * gpu::num_threads() + gpu::thread(), step = gpu::grid_x() * gpu::num_threads();
  float peak = arrange_factor(p.q.right, p.q.right_size, p.b_tiles, false, p.operands, first, step);
  arrange_factor(p.q.left, p.q.left_size, p.a_tiles, true, p.operands + p.b_tiles * p.b_tiles * 32, first, step);
  peak = reduce_max(peak);
  if (gpu::lane() == 0) warp_peaks[gpu::warp()] = peak;
  gpu::sync_block();
  if (gpu::thread() > 0) return;
  for (int i = 1; i < kArrangeThreads / 32; ++i) peak = gpu::max(peak, warp_peaks[i]);
  p.peaks[gpu::block_x()] = peak;
}

// A kernel for tiles up to these, the threads it is bounded to, and the blocks an SM's registers then hold.
struct Variant {
  int a_tiles, b_tiles, strips, max_threads, blocks;
  void (*kernel)(TileArgs);
};
template <int kATiles, int kBTiles, int kStrips, int kMaxThreads, int kBlocks, int kLoads>
constexpr Variant variant() {
  return {kATiles,     kBTiles, kStrips,
          kMaxThreads, kBlocks, quantize_tile<kATiles, kBTiles, kStrips, kMaxThreads, kBlocks, kLoads>};
}
// Of those that fit, the first is the plan's choice for many rows, the last for few.
constexpr Variant kVariants[] = {
    variant<1, 2, 1, 256, 2, 2>(),   // small tiles
    variant<4, 4, 2, 512, 1, 16>(),  // 64 x 64, 56 x 64
    variant<4, 4, 1, 512, 1, 8>(),
    variant<6, 8, 2, 256, 2, 4>(),   // 96 x 128
    variant<6, 8, 1, 256, 2, 12>(),
    variant<8, 10, 1, 640, 1, 4>(),  // 128 x 148
};

struct TilePlan {
  TileArgs args;
  void (*kernel)(TileArgs);
  int threads, blocks;
  size_t shared_bytes;
};

constexpr int kBlockBytes = 1024;  // of shared memory that the driver takes of each block
int ceil_div(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

const Variant* choose_variant(int a_tiles, int b_tiles, bool few_rows) {
  const Variant* chosen = nullptr;
  for (const Variant& v : kVariants) {
    if (v.a_tiles < a_tiles || v.b_tiles < b_tiles) continue;
    if (!chosen) {
      chosen = &v;
    } else if (few_rows && v.a_tiles == chosen->a_tiles && v.b_tiles == chosen->b_tiles) {
      chosen = &v;
    }
  }
  return chosen;
}

// Sizes and places of shared memory for blocks of p.tokens tokens; its bytes.
size_t place(TileArgs& p, bool resident) {
  const int right = p.b_tiles * p.b_tiles * 512, left = p.a_tiles * p.a_tiles * 512;
  p.pitch = p.b_tiles * 32 + 16;
  p.token_bytes = p.a_tiles * 16 * p.pitch + 32;  // 32 more than a multiple of 128: TAC reads 8 tokens at once
  p.tiles_at = static_cast<int>(sizeof(TileShared)) + (resident ? right + left : right > left ? right : left);
  p.groups_at = p.tiles_at + p.tokens * p.token_bytes;
  p.group_bytes = 0;
  if (p.q.a_group) {
    const size_t bytes = p.q.inner / 16 * sizeof(Extremes) + num_groups(p.q) * sizeof(GroupGrid);
    p.group_bytes = static_cast<int>((bytes + 15) / 16 * 16);
  }
  return p.groups_at + p.tokens * p.group_bytes;
}

bool takes(const QuantizeArgs& q) {
  return q.left_size > 0 && q.right_size % 4 == 0 && q.bits <= 4 && (!q.tac_block || q.tac_block == kTacBlock) &&
         (!q.a_group || q.right_size % 16 == 0);
}

// Tokens of a block: 8 warps, two such blocks an SM, or fewer so that every SM has a block. With TAC, of which each
// block reads all, as many as can be: L2 is its limit, and loads in flight hide its latency.
int choose_tokens(const TileArgs& p, const Variant& v, const Device& device) {
  const int threads = p.q.tac_block || v.max_threads > 512 ? v.max_threads : 256, most = threads / (32 * p.team_warps);
  const int wanted = p.q.tac_block ? most : ceil_div(p.rows, device.num_sms);
  const int tokens = wanted < most ? wanted : most;
  return tokens < 1 ? 1 : tokens < kMaxTeams ? tokens : kMaxTeams;
}

// False where the path cannot take these arguments on this device.
bool plan_tile(const QuantizeArgs& q, const Device& device, TilePlan& plan) {
  if (!takes(q)) return false;
  const size_t limit = device.shared_bytes;
  TileArgs& p = plan.args;
  p = {};
  p.q = q;
  p.rows = static_cast<int32_t>(q.rows);
  p.a_tiles = ceil_div(q.left_size, 16);
  p.b_tiles = ceil_div(q.right_size, 16);
  const Variant* v = choose_variant(p.a_tiles, p.b_tiles, q.rows <= 2 * device.num_sms);
  if (!v) return false;
  p.team_warps = ceil_div(p.b_tiles, v->strips);
  p.b_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + q.right_size - 1) / q.right_size);
  p.tokens = choose_tokens(p, *v, device);
  while (p.tokens > 1 && place(p, true) > limit) --p.tokens;
  const bool resident = place(p, true) <= limit;
  plan.shared_bytes = place(p, resident);
  if (plan.shared_bytes > limit) return false;
  p.num_peaks = resident ? 0 : kArrangeBlocks;
  plan.kernel = v->kernel;
  plan.threads = 32 * p.team_warps * p.tokens;
  const int by_shared = static_cast<int>((limit + kBlockBytes) / (plan.shared_bytes + kBlockBytes));
  const int by_registers = v->blocks * v->max_threads / plan.threads, groups = ceil_div(q.rows, p.tokens);
  const int resident_blocks = device.num_sms * (by_shared < by_registers ? by_shared : by_registers);
  plan.blocks = groups < resident_blocks ? groups : resident_blocks;
  return true;
}

size_t operand_bytes(int a_tiles, int b_tiles) {
  return static_cast<size_t>(a_tiles * a_tiles + b_tiles * b_tiles) * 512;
}

}  // namespace

bool tile_can(const QuantizeArgs& q, const Device& device) {
  TilePlan plan;
  return plan_tile(q, device, plan);
}

// Whether a block keeps the operands depends on the rows and the device; the room for them is there at any.
size_t tile_workspace(const QuantizeArgs& q) {
  const int a_tiles = ceil_div(q.left_size, 16), b_tiles = ceil_div(q.right_size, 16);
  if (!takes(q) || !choose_variant(a_tiles, b_tiles, false)) return 0;
  return operand_bytes(a_tiles, b_tiles) + kArrangeBlocks * sizeof(float);
}

const char* run_quantize_tile(const QuantizeArgs& q, const Launch& launch) {
  TilePlan plan;
  plan_tile(q, launch.device, plan);
  TileArgs& p = plan.args;
  if (p.num_peaks > 0) {
    gpu::Vec* operands = static_cast<gpu::Vec*>(launch.workspace);
    float* peaks = reinterpret_cast<float*>(operands + operand_bytes(p.a_tiles, p.b_tiles) / sizeof(gpu::Vec));
    const ArrangeArgs arrange = {q, p.a_tiles, p.b_tiles, operands, peaks};
    const char* failure = gpu::launch(arrange_factors, {kArrangeBlocks}, kArrangeThreads,
                                      kArrangeThreads / 32 * sizeof(float), launch.stream, arrange);
    if (failure) return failure;
    p.operands = operands;
    p.peaks = peaks;
  }
  return gpu::launch(plan.kernel, {static_cast<unsigned>(plan.blocks)}, plan.threads, plan.shared_bytes, launch.stream,
                     p);
}

}  // namespace dllmc
