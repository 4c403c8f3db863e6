// How a block reads a row of DllmcQuantize, 16 bytes a lane, and how it turns values in registers into codes.
#pragma once

#include "quantize.h"

namespace dllmc {

// A 16-byte load is 4 values of float32 or 8 of float16.
DLLMC_DEVICE void unpack(const gpu::Vec& v, float (&y)[4]) {
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) y[i] = from_bits(v.v[i]);
}
DLLMC_DEVICE void unpack(const gpu::Vec& v, float (&y)[8]) {
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = gpu::low_half(v.v[i]);
    y[2 * i + 1] = gpu::high_half(v.v[i]);
  }
}

// y[0..] *= factors[k..], in float32.
template <int kValues>
DLLMC_DEVICE void scale_values(float (&y)[kValues], const float* factors, int k) {
  DLLMC_UNROLL
  for (int i = 0; i < kValues; i += 4) {
    const gpu::Vec f = gpu::load_shared_reads(factors + k + i);
    DLLMC_UNROLL
    for (int j = 0; j < 4; ++j) y[i + j] = gpu::mul(y[i + j], from_bits(f.v[j]));
  }
}

DLLMC_DEVICE const unsigned char* row_of(const QuantizeArgs& p, int64_t m) {
  return static_cast<const unsigned char*>(p.x) + m * p.inner * (p.x_type == Type::kFloat32 ? 4 : 2);
}

// 1 / sqrt(mean(x^2) + eps), or 1 without a norm.
DLLMC_DEVICE float norm_factor(const QuantizeArgs& p, float square_sum) {
  if (!p.norm_weight) return 1.0f;
  const float mean = gpu::div(square_sum, gpu::from_int(p.inner));
  return gpu::div(1.0f, gpu::sqrt(gpu::add(mean, p.eps)));
}

// What a thread loads of a row: load v of `threads` threads starts at value (v * threads + id) * kValues.
// Values are x * norm_weight * channel_scale; the norm's own factor, one number a row, is left to the scale.
template <int kValues, int kVecs>
struct RowLoads {
  gpu::Vec raw[kVecs];

  // Loads first, first + 1, ...
  DLLMC_DEVICE void load(const QuantizeArgs& p, int64_t m, int first, int id, int threads) {
    const unsigned char* row = row_of(p, m);
    DLLMC_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      raw[v] = {};
      const int i = (first + v) * threads + id;
      if (i * kValues < p.inner) raw[v] = gpu::load_shared_reads(row + static_cast<int64_t>(i) * 16);
    }
  }

  // Values k.. of load v; adds their squares before the weights to square_sum.
  DLLMC_DEVICE void values(const QuantizeArgs& p, int v, int k, float (&y)[kValues], float& square_sum) const {
    unpack(raw[v], y);
    if (k >= p.inner) return;
    if (p.norm_weight) {
      DLLMC_UNROLL
      for (int i = 0; i < kValues; ++i) square_sum = gpu::fma(y[i], y[i], square_sum);
      scale_values(y, p.norm_weight, k);
    }
    if (p.channel_scale) scale_values(y, p.channel_scale, k);
  }
};

// The same as values, all of them.
template <int kValues, int kVecs>
struct RowPart {
  float y[kVecs][kValues];
  float square_sum = 0.0f;

  DLLMC_DEVICE void load(const QuantizeArgs& p, int64_t m) {
    RowLoads<kValues, kVecs> loads;
    loads.load(p, m, 0, gpu::thread(), gpu::num_threads());
    DLLMC_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      loads.values(p, v, (v * gpu::num_threads() + gpu::thread()) * kValues, y[v], square_sum);
    }
  }
};

constexpr int kMaxRowWarps = 32;

struct Partial {
  float square_sum;
  Extremes extremes;
};

struct RowsShared {  // followed, with groups, by extremes of K / 128 units and a grid for each group
  Partial partials[kMaxRowWarps];
  DLLMC_DEVICE Extremes* units() { return reinterpret_cast<Extremes*>(this + 1); }
  DLLMC_DEVICE Grid* grids(int num_units) { return reinterpret_cast<Grid*>(units() + num_units); }
};

DLLMC_HOST_DEVICE size_t rows_shared_bytes(const QuantizeArgs& p) {
  const size_t groups = p.a_group ? p.inner / kUnit * sizeof(Extremes) + num_groups(p) * sizeof(Grid) : 0;
  return sizeof(RowsShared) + groups;
}

// Extremes of units of 128 values, which the lanes of one warp hold.
template <int kValues, int kVecs>
DLLMC_DEVICE void leave_unit_extremes(const float (&y)[kVecs][kValues], int inner, Extremes* units) {
  constexpr int kLanes = kUnit / kValues;
  for (int v = 0; v < kVecs; ++v) {
    Extremes e;
    DLLMC_UNROLL
    for (int i = 0; i < kValues; ++i) e.include(y[v][i]);
    e = reduce(e, kLanes);
    const int k = (v * gpu::num_threads() + gpu::thread()) * kValues;
    if (k < inner && gpu::lane() % kLanes == 0) units[k / kUnit] = e;
  }
}

// The block's sum of squares, and with whole rows its extremes; contains the barrier.
template <int kValues, int kVecs>
DLLMC_DEVICE Partial reduce_row(const float (&y)[kVecs][kValues], float square_sum, bool whole, RowsShared& s) {
  Partial mine = {reduce_sum(square_sum), {}};
  if (whole) {
    DLLMC_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      DLLMC_UNROLL
      for (int i = 0; i < kValues; ++i) mine.extremes.include(y[v][i]);
    }
    mine.extremes = reduce(mine.extremes);
  }
  if (gpu::lane() == 0) s.partials[gpu::warp()] = mine;
  gpu::sync_block();
  Partial all = {0.0f, {}};
  if (gpu::lane() * 32 < gpu::num_threads()) all = s.partials[gpu::lane()];
  return {reduce_sum(all.square_sum), reduce(all.extremes)};
}

// Grids of all groups from their units' extremes; contains the second barrier.
DLLMC_DEVICE void make_group_grids(const QuantizeArgs& p, int64_t m, float factor, const Extremes* units, Grid* grids) {
  const int group_units = p.a_group / kUnit;
  for (int g = gpu::thread(); g < num_groups(p); g += gpu::num_threads()) {
    Extremes e;
    for (int i = 0; i < group_units; ++i) e.include(units[g * group_units + i]);
    grids[g] = make_grid(p, {gpu::mul(e.low, factor), gpu::mul(e.high, factor)});
    store_grid(p, grids[g], m, g);
  }
  gpu::sync_block();
}

// Codes of values k.. of row m. Without a norm they are those of true divisions.
template <int kValues>
DLLMC_DEVICE void store_codes(const QuantizeArgs& p, int64_t m, int k, const float (&y)[kValues], const Grid& grid,
                              float factor) {
  const float steps = gpu::mul(factor, grid.inverse);
  uint32_t words[kValues / 4];
  DLLMC_UNROLL
  for (int i = 0; i < kValues; i += 4) {
    int codes[4];
    DLLMC_UNROLL
    for (int j = 0; j < 4; ++j) {
      codes[j] = p.norm_weight ? near_code(grid, gpu::mul(y[i + j], steps)) : exact_code(grid, y[i + j]);
    }
    words[i / 4] = p.bits <= 4 ? pack_nibbles(codes) : pack_bytes(codes);
  }
  const int64_t first = m * p.inner + k;
  if (p.bits > 4) {
    memcpy(__builtin_assume_aligned(p.codes + first, kValues), words, kValues);
  } else if constexpr (kValues == 8) {
    *reinterpret_cast<uint32_t*>(p.codes + first / 2) = words[0] | words[1] << 16;
  } else {
    *reinterpret_cast<uint16_t*>(p.codes + first / 2) = static_cast<uint16_t>(words[0]);
  }
}

// Grids, codes, scales and zero points of row m, whose values are factor * y; `extremes` are those of y, without
// groups.
template <int kValues, int kVecs>
DLLMC_DEVICE void write_row(const QuantizeArgs& p, int64_t m, const float (&y)[kVecs][kValues],
                            const Extremes& extremes, float factor, RowsShared& s) {
  const Grid* grids = s.grids(p.inner / kUnit);
  Grid grid = {};
  if (p.a_group) {
    make_group_grids(p, m, factor, s.units(), s.grids(p.inner / kUnit));
  } else {
    grid = make_grid(p, {gpu::mul(extremes.low, factor), gpu::mul(extremes.high, factor)});
    if (gpu::thread() == 0) store_grid(p, grid, m, 0);
  }
  DLLMC_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    const int k = (v * gpu::num_threads() + gpu::thread()) * kValues;
    if (k >= p.inner) continue;
    if (p.a_group) grid = grids[k / p.a_group];
    store_codes(p, m, k, y[v], grid, factor);
  }
}

}  // namespace dllmc
