// The end of the tile path: from the turned tile in registers to gate, extremes, grids and packed codes.
#pragma once

#include "quantize_tile.h"

namespace dllmc {

// What a group's codes need: values / scale = z * steps.
struct GroupGrid {
  Grid grid;
  float steps;
};

// A warp's share of the turned tile: [i][j] is rows 16 i.., columns 8 j.. of its strips, in the order of an mma's
// result.
template <int kATiles, int kStrips>
using Sums = float[kATiles][2 * kStrips][4];

struct Place {  // of z[i][j][d] in the token's tile
  int row, column;
};
DLLMC_DEVICE Place place_of(int lane, int first_column, int i, int j, int d) {
  const int r = lane / 4, t = lane % 4;
  return {i * 16 + r + d / 2 * 8, first_column + j * 8 + 2 * t + d % 2};
}

template <int kATiles, int kStrips>
DLLMC_DEVICE void gate(const QuantizeArgs& p, const Team& team, int64_t m, Sums<kATiles, kStrips>& z) {
  const Span dropped = dropped_slice(p, m);
  const int first_column = team.warp * kStrips * 16;
  DLLMC_UNROLL
  for (int i = 0; i < kATiles; ++i) {
    DLLMC_UNROLL
    for (int j = 0; j < 2 * kStrips; ++j) {
      DLLMC_UNROLL
      for (int d = 0; d < 4; ++d) {
        const Place at = place_of(team.lane, first_column, i, j, d);
        if (dropped.holds(p.gate_axis == 0 ? at.row : at.column)) z[i][j][d] = 0.0f;
      }
    }
  }
}

DLLMC_DEVICE GroupGrid make_group(const QuantizeArgs& p, const Extremes& e, float unscale, int64_t m, int group,
                                  bool store) {
  const Grid grid = make_grid(p, {gpu::mul(e.low, unscale), gpu::mul(e.high, unscale)});
  if (store) store_grid(p, grid, m, group);
  return {grid, gpu::mul(unscale, grid.inverse)};
}

// The grid of a whole row; contains a team barrier.
template <int kATiles, int kStrips>
DLLMC_DEVICE GroupGrid find_row_grid(const QuantizeArgs& p, TeamShared& s, const Team& team, int64_t m, float unscale,
                                     const Sums<kATiles, kStrips>& z) {
  Extremes e;
  DLLMC_UNROLL
  for (int i = 0; i < kATiles * 2 * kStrips * 4; ++i) e.include(z[i / 4 / (2 * kStrips)][i / 4 % (2 * kStrips)][i % 4]);
  e = reduce(e);
  if (team.lane == 0) s.extremes[team.warp] = e;
  team.sync();
  Extremes all;
  if (team.lane < team.warps) all = s.extremes[team.lane];
  return make_group(p, reduce(all), unscale, m, 0, team.id() == 0);
}

// Grids of all groups, from the extremes of 16 columns of a row at a time; contains two team barriers.
template <int kATiles, int kStrips>
DLLMC_DEVICE const GroupGrid* find_group_grids(const TileArgs& p, unsigned char* shared, const Team& team, int64_t m,
                                               float unscale, const Sums<kATiles, kStrips>& z) {
  Extremes* parts = reinterpret_cast<Extremes*>(shared);
  GroupGrid* grids = reinterpret_cast<GroupGrid*>(parts + p.q.inner / 16);
  DLLMC_UNROLL
  for (int i = 0; i < kATiles; ++i) {
    DLLMC_UNROLL
    for (int h = 0; h < 2 * kStrips; ++h) {  // rows r and r + 8 of each strip
      const int s = h / 2, d = h % 2 * 2;
      Extremes e;
      for (int j = 0; j < 2; ++j) {
        e.include(z[i][2 * s + j][d]);
        e.include(z[i][2 * s + j][d + 1]);
      }
      e = reduce(e, 4);
      const int row = place_of(team.lane, 0, i, 0, d).row, strip = team.warp * kStrips + s;
      if (team.lane % 4 == 0 && row < p.q.left_size && strip < p.b_tiles) parts[row * p.b_tiles + strip] = e;
    }
  }
  team.sync();
  const int group_parts = p.q.a_group / 16;
  for (int g = team.id(); g < num_groups(p.q); g += team.threads()) {
    Extremes e;
    for (int i = 0; i < group_parts; ++i) e.include(parts[g * group_parts + i]);
    grids[g] = make_group(p.q, e, unscale, m, g, true);
  }
  team.sync();
  return grids;
}

// Bytes 0..3 of a quad's lanes are of its 8-column tiles 0..3; lane t gets those of tile t in the order of columns.
DLLMC_DEVICE uint32_t swap_in_quad(int t, uint32_t word) {
  const uint32_t next = gpu::shuffle_xor(word, 1);
  word = gpu::permute_bytes(word, next, t % 2 == 0 ? 0x6240 : 0x3715);
  const uint32_t far = gpu::shuffle_xor(word, 2);
  return gpu::permute_bytes(word, far, t < 2 ? 0x5410 : 0x3276);
}

// Bytes of 2 kStrips tiles of 8 columns, from `column` on, of one row.
template <int kStrips>
DLLMC_DEVICE void store_bytes(const QuantizeArgs& p, int t, int8_t* codes, int row, int column, uint32_t word) {
  const int b = p.right_size;
  const bool inside = row < p.left_size;
  if (kStrips == 2 && b % 8 == 0) {
    word = swap_in_quad(t, word);
    const int first = column + 8 * t;
    if (inside && first < b) *reinterpret_cast<uint32_t*>(codes + (row * b + first) / 2) = word;
    return;
  }
  DLLMC_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    const uint32_t mine = word >> 16 * s, next = gpu::shuffle_xor(mine, 1);
    const uint32_t pair = gpu::permute_bytes(mine, next, t % 2 == 0 ? 0x7640 : 0x7615);
    const int first = column + 16 * s + t % 2 * 8 + t / 2 * 4;
    if (inside && first < b) *reinterpret_cast<uint16_t*>(codes + (row * b + first) / 2) = static_cast<uint16_t>(pair);
  }
}

template <int kATiles, int kStrips>
DLLMC_DEVICE void store_codes(const TileArgs& p, const Team& team, int64_t m, const GroupGrid& row_grid,
                              const GroupGrid* groups, const Sums<kATiles, kStrips>& z) {
  int8_t* codes = p.q.codes + m * (p.q.inner / 2);
  const int first_column = team.warp * kStrips * 16;
  DLLMC_UNROLL
  for (int i = 0; i < kATiles; ++i) {
    if (i >= p.a_tiles) break;
    DLLMC_UNROLL
    for (int d = 0; d < 4; d += 2) {
      const int row = place_of(team.lane, 0, i, 0, d).row;
      uint32_t word = 0;
      DLLMC_UNROLL
      for (int j = 0; j < 2 * kStrips; ++j) {
        GroupGrid g = row_grid;
        const int k = row * p.q.right_size + first_column + j * 8;
        if (groups && k < p.q.inner) g = groups[k / p.q.a_group];
        const int low = near_code(g.grid, gpu::mul(z[i][j][d], g.steps));
        const int high = near_code(g.grid, gpu::mul(z[i][j][d + 1], g.steps));
        word |= static_cast<uint32_t>((low & 15) | (high & 15) << 4) << 8 * j;
      }
      store_bytes<kStrips>(p.q, team.lane % 4, codes, row, first_column, word);
    }
  }
}

}  // namespace dllmc
