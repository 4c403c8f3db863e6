// The linear for at most 64 tokens: small_tile.h, then the epilogue. Formats and groups as in the reference.
//
// Without groups a unit's sums meet once. With groups they meet after each round of 8 groups, one a warp; a thread
// then adds its outputs' terms group after group, as the reference does.
#include <type_traits>

#include "epilogue.h"
#include "linear.h"
#include "small_tile.h"

namespace dllmc {
namespace {

// What a unit's outputs need from memory besides sums, on its way to shared memory while the unit is multiplied: a
// block with one unit has no later product to hide these reads behind.
template <int kColumns, int kTiles>
class StagedTerms {
 public:
  static constexpr int kOutputs = kTiles * kTileOutputs;
  static constexpr int kBytes = (3 + 8 * kColumns) * kOutputs * 4;

  DLLMC_DEVICE StagedTerms(const LinearArgs& p, unsigned char* shared) : p_(p), shared_(shared) {}

  DLLMC_DEVICE void fetch(int unit) const {
    const int n = unit * kOutputs;
    fetch_table(0, p_.w_scale, n);
    fetch_table(1, p_.bias, n);
    if (p_.zero) fetch_table(2, p_.w_sum, n);
    if (p_.residual) p_.residual_type == Type::kFloat32 ? fetch_residual<4>(n) : fetch_residual<2>(n);
    gpu::commit_copies();
  }

  // Terms of outputs n and n + 1, counted from the unit's first.
  DLLMC_DEVICE void read(int n, OutputTerms& first, OutputTerms& second) const {
    const Pair w_scale = table<Pair>(0)[n / 2], bias = p_.bias ? table<Pair>(1)[n / 2] : Pair{kNothing, kNothing};
    const SumPair w_sum = p_.zero ? table<SumPair>(2)[n / 2] : SumPair{0, 0};
    first = {w_scale.first, bias.first, w_sum.first};
    second = {w_scale.second, bias.second, w_sum.second};
  }
  DLLMC_DEVICE Pair residual(int token, int n) const {
    if (!p_.residual) return {kNothing, kNothing};
    const int i = (token * kOutputs + n) / 2;
    if (p_.residual_type == Type::kFloat32) return table<Pair>(3)[i];
    const uint32_t halves = table<uint32_t>(3)[i];
    return {gpu::low_half(halves), gpu::high_half(halves)};
  }

 private:
  template <class T>
  DLLMC_DEVICE T* table(int i) const {
    return reinterpret_cast<T*>(shared_ + i * kOutputs * 4);
  }

  DLLMC_DEVICE void fetch_table(int i, const void* values, int n) const {
    const int first = 4 * gpu::thread();
    if (!values || first >= kOutputs) return;
    gpu::copy_async(table<uint32_t>(i) + first, static_cast<const uint32_t*>(values) + n + first,
                    n + first < p_.outputs);
  }

  template <int kSize>
  DLLMC_DEVICE void fetch_residual(int n) const {
    constexpr int kTokenCopies = kOutputs * kSize / 16, kCopies = 8 * kColumns * kTokenCopies;
    DLLMC_UNROLL
    for (int base = 0; base < kCopies; base += kSmallThreads) {
      const int i = base + gpu::thread(), token = i / kTokenCopies, first = i % kTokenCopies * (16 / kSize);
      if (token >= p_.rows) return;
      const int64_t from = (static_cast<int64_t>(token) * p_.outputs + n + first) * kSize;
      gpu::copy_async(table<unsigned char>(3) + 16 * i, static_cast<const unsigned char*>(p_.residual) + from,
                      n + first < p_.outputs);
    }
  }

  const LinearArgs& p_;
  unsigned char* shared_;
};

// Owns the outputs of a block: makes values of sums and writes them.
template <class Format, int kColumns, int kTiles>
class RowsFlush {
 public:
  static constexpr int kBytes = UnitPairs<kColumns, kTiles>::kBytes + StagedTerms<kColumns, kTiles>::kBytes;

  DLLMC_DEVICE RowsFlush(const LinearArgs& p, int unit, int end)
      : p_(p), end_(end), sums_(reinterpret_cast<SumPair*>(gpu::shared())), terms_(p, gpu::shared() + Unit::kBytes) {
    terms_.fetch(unit);
  }

  DLLMC_DEVICE void operator()(const int32_t (&acc)[kTiles][kColumns][4], int unit, int) const {
    gpu::wait_copies<0>();
    gpu::sync_block();
    Unit::write(sums_, acc);
    Owned owned[Unit::kOwned];
    DLLMC_UNROLL
    for (int i = 0; i < Unit::kOwned; ++i) owned[i] = own(unit, gpu::thread() + i * kSmallThreads);
    gpu::sync_block();
    if (unit + 1 < end_) terms_.fetch(unit + 1);
    DLLMC_UNROLL
    for (int i = 0; i < Unit::kOwned; ++i) {
      if (owned[i].present) finish(owned[i], gpu::thread() + i * kSmallThreads);
    }
  }

 private:
  using Unit = UnitPairs<kColumns, kTiles>;

  struct Owned {
    bool present;
    int m, n;
    TokenTerms token;
    OutputTerms first, second;
    Pair residual;
  };

  DLLMC_DEVICE Owned own(int unit, int i) const {
    Owned o = {};
    o.m = Unit::token(i);
    o.n = unit * kTiles * kTileOutputs + Unit::output(i);
    o.present = i < Unit::kPairs && o.m < p_.rows && o.n < p_.outputs;
    if (!o.present) return o;
    o.token = token_terms(p_, o.m);
    terms_.read(Unit::output(i), o.first, o.second);
    o.residual = terms_.residual(o.m, Unit::output(i));
    return o;
  }

  DLLMC_DEVICE void finish(const Owned& o, int i) const {
    SumPair sum = {0, 0};
    DLLMC_UNROLL
    for (int w = 0; w < kSmallWarps; ++w) {
      const SumPair part = sums_[w * Unit::kPairs + i];
      sum = {sum.first + part.first, sum.second + part.second};
    }
    const Pair y = {channel_value(sum.first >> Format::kShift, o.first, o.token),
                    channel_value(sum.second >> Format::kShift, o.second, o.token)};
    store_pair(p_, y, o.residual, o.m, o.n);
  }

  const LinearArgs& p_;
  const int end_;
  SumPair* sums_;
  StagedTerms<kColumns, kTiles> terms_;
};

// The same with a float32 sum of terms of groups, carried from round to round.
template <class Format, int kColumns>
class GroupsFlush {
 public:
  static constexpr int kBytes = UnitPairs<kColumns, 1>::kBytes;

  DLLMC_DEVICE GroupsFlush(const LinearArgs& p, int, int)
      : p_(p), sums_(reinterpret_cast<SumPair*>(gpu::shared())), num_groups_(num_groups(p)) {}

  DLLMC_DEVICE void operator()(const int32_t (&acc)[1][kColumns][4], int unit, int round) {
    gpu::sync_block();
    Unit::write(sums_, acc);
    gpu::sync_block();
    DLLMC_UNROLL
    for (int i = 0; i < Unit::kOwned; ++i) {
      const int pair = gpu::thread() + i * kSmallThreads;
      const int m = Unit::token(pair), n = unit * kTileOutputs + Unit::output(pair);
      if (pair >= Unit::kPairs || m >= p_.rows) continue;
      add_round(total_[i], pair, m, n, round * kSmallWarps);
      if ((round + 1) * kSmallWarps < num_groups_) continue;
      store_pair(p_, finish_sum(p_, total_[i].first, m, n), finish_sum(p_, total_[i].second, m, n + 1), m, n);
    }
  }

 private:
  using Unit = UnitPairs<kColumns, 1>;

  // Adds the terms of up to 8 groups from `group` on, in ascending order.
  DLLMC_DEVICE void add_round(Pair& total, int pair, int m, int n, int group) const {
    for (int w = 0; w < kSmallWarps && group + w < num_groups_; ++w) {
      const SumPair part = sums_[w * Unit::kPairs + pair];
      const int g = group + w;
      const Pair term = {group_term(p_, part.first >> Format::kShift, m, n, g, num_groups_),
                         group_term(p_, part.second >> Format::kShift, m, n + 1, g, num_groups_)};
      total = g ? Pair{gpu::add(total.first, term.first), gpu::add(total.second, term.second)} : term;
    }
  }

  const LinearArgs& p_;
  SumPair* sums_;
  const int num_groups_;
  Pair total_[Unit::kOwned] = {};
};

template <class Format, int kColumns, int kTiles, bool kGrouped>
using Flush = std::conditional_t<kGrouped, GroupsFlush<Format, kColumns>, RowsFlush<Format, kColumns, kTiles>>;

template <class Format, int kColumns, int kTiles, bool kGrouped>
DLLMC_KERNEL(kSmallThreads, (SmallTile<Format, kColumns, kTiles, kGrouped>::kBlocksPerSm))
void linear_small(DLLMC_PARAM LinearArgs p) {
  if constexpr (std::is_same_v<Format, Int4> && !gpu::kHasInt4) {
    gpu::trap();
  } else {
    const int n_tiles = p.outputs / kTileOutputs, units = (n_tiles + kTiles - 1) / kTiles;
    const int k_tiles = p.inner / Format::kCodesPerTile;
    const SmallProduct product = {p.codes, p.weight, static_cast<int>(p.rows), k_tiles * Format::kActivationBytes,
                                  n_tiles, k_tiles,  kGrouped ? group_size(p) / Format::kCodesPerTile : 1};
    const Share share = share_of(units, gpu::block_x(), gpu::grid_x());
    SmallTile<Format, kColumns, kTiles, kGrouped> tile(product);
    tile.start(share.begin);
    Flush<Format, kColumns, kTiles, kGrouped> flush(p, share.begin, share.end);
    tile.run(share.begin, share.end, flush);
  }
}

template <class Format, int kColumns, int kTiles, bool kGrouped>
const char* launch_small(const LinearArgs& p, const Launch& launch) {
  constexpr int kBlocksPerSm = SmallTile<Format, kColumns, kTiles, kGrouped>::kBlocksPerSm;
  const int units = (p.outputs / kTileOutputs + kTiles - 1) / kTiles;
  const unsigned grid = static_cast<unsigned>(small_grid(units, launch.device.num_sms, kBlocksPerSm));
  return gpu::launch(linear_small<Format, kColumns, kTiles, kGrouped>, gpu::Dim{grid}, kSmallThreads,
                     Flush<Format, kColumns, kTiles, kGrouped>::kBytes, launch.stream, p);
}

// Two tiles a unit halve what L1 sends, where at least two units for each of two blocks an SM remain.
bool is_wide(const LinearArgs& p, const Device& device) {
  return p.outputs / (2 * kTileOutputs) >= 4 * device.num_sms;
}

template <class Format>
const char* run_format(const LinearArgs& p, const Launch& launch) {
  if (p.a_group || p.w_group) {
    if (p.rows <= 8) return launch_small<Format, 1, 1, true>(p, launch);
    return p.rows <= 32 ? launch_small<Format, 4, 1, true>(p, launch) : launch_small<Format, 8, 1, true>(p, launch);
  }
  if (p.rows <= 8) return launch_small<Format, 1, 1, false>(p, launch);
  if (p.rows <= 16) return launch_small<Format, 2, 1, false>(p, launch);
  if (p.rows > 32) return launch_small<Format, 8, 1, false>(p, launch);
  return is_wide(p, launch.device) ? launch_small<Format, 4, 2, false>(p, launch)
                                   : launch_small<Format, 4, 1, false>(p, launch);
}

}  // namespace

const char* run_small(const LinearArgs& p, const Launch& launch) {
  return with_format(p, launch.device, [&](auto format) { return run_format<decltype(format)>(p, launch); });
}

}  // namespace dllmc
