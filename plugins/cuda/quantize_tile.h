// The parts of the tile path (quantize_tile.cu says how they work together): operands of the Kronecker factors, a
// token's halves, TAC, and the two products.
//
// A token is a tile of halves in shared memory, a_tiles * 16 rows at a pitch of an odd number of 16 bytes, so that 8
// rows of an ldmatrix, and the 8 rows that a warp's results go to, touch each bank once. Rows and columns that pad a
// and b to 16 are zero and stay zero: the factors' padding is zero, too.
#pragma once

#include "quantize_row.h"

namespace dllmc {

constexpr int kTacBlock = 16;
constexpr int kMaxTeams = 8, kMaxTeamWarps = 16, kMaxTileWarps = 20;

struct TileArgs {
  QuantizeArgs q;
  int32_t rows;                              // M
  int32_t tokens, team_warps;                // of a block; of a token
  int32_t a_tiles, b_tiles;                  // ceil(a / 16), ceil(b / 16)
  int32_t pitch, token_bytes;                // of a row, and of a token, in shared memory
  int32_t tiles_at, groups_at, group_bytes;  // where tiles, and what groups need of a token, start in shared memory
  uint32_t b_inverse;                        // ceil(2^32 / b)
  const gpu::Vec* operands;  // the factors' operands in global memory, where a block cannot keep both; else null
  const float* peaks;        // with them: the largest |right| of each block that arranged them
  int32_t num_peaks;
};

struct RowStats {
  float peak, square_sum;
};
struct TeamShared {
  RowStats stats[kMaxTeamWarps];
  Extremes extremes[kMaxTeamWarps];
  float unscale, bias_scale;  // halves -> values, and 1 / that
};
struct alignas(16) TileShared {
  float right_peak[kMaxTileWarps], bias_peak[kMaxTileWarps];
  float compensated_peak[kMaxTileWarps][kMaxTeams];
  TeamShared teams[kMaxTeams];
};

DLLMC_DEVICE int biased_exponent(float x) { return static_cast<int>(float_bits(x) >> 23 & 255u); }
DLLMC_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
// 2^(exponent - 127)
DLLMC_DEVICE float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(exponent) << 23); }
DLLMC_DEVICE float reduce_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = gpu::max(x, gpu::shuffle_xor(x, mask));
  return x;
}
DLLMC_DEVICE float finite_half(float x) { return gpu::min(gpu::max(x, -65504.0f), 65504.0f); }

// Operands of a factor as a lane loads them: 16 bytes at (outer * tiles + inner) * 32 + lane.
//   right, the B operand: outer is 16 output columns, words {b0, b1} of the first 8, then of the last 8
//   left, the A operand of its transpose: outer is 16 output rows, words a0..a3
// Returns the largest magnitude this thread met.
DLLMC_DEVICE float arrange_factor(const float* factor, int size, int tiles, bool is_left, gpu::Vec* out, int first,
                                  int step) {
  float peak = 0.0f;
  for (int i = first; i < tiles * tiles * 32; i += step) {
    const int lane = i % 32, r = lane / 4, t = lane % 4, outer = i / 32 / tiles, inner = i / 32 % tiles;
    gpu::Vec words;
    DLLMC_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int n = outer * 16 + (is_left ? j & 1 : j >> 1) * 8 + r;
      const int k = inner * 16 + (is_left ? j >> 1 : j & 1) * 8 + 2 * t;
      const float low = n < size && k < size ? factor[k * size + n] : 0.0f;
      const float high = n < size && k + 1 < size ? factor[(k + 1) * size + n] : 0.0f;
      peak = gpu::max(peak, gpu::max(gpu::abs(low), gpu::abs(high)));
      words.v[j] = gpu::pack_halves(finite_half(low), finite_half(high));
    }
    out[i] = words;
  }
  return peak;
}

struct alignas(8) FourHalves {
  uint32_t low, high;
};

// Where channel k of a token stands; 4 channels from a multiple of 4 on stand side by side, as 4 divides b.
DLLMC_DEVICE int half_offset(const TileArgs& p, int k) {
  const int row = static_cast<int>(static_cast<uint64_t>(k) * p.b_inverse >> 32);
  return row * p.pitch + (k - row * p.q.right_size) * 2;
}

// Values k.. of a row, times a power of two.
template <int kValues>
DLLMC_DEVICE void store_halves(const TileArgs& p, unsigned char* tile, int k, const float (&y)[kValues],
                               float prescale) {
  uint32_t words[kValues / 2];
  DLLMC_UNROLL
  for (int i = 0; i < kValues / 2; ++i) {
    words[i] = gpu::pack_halves(gpu::mul(y[2 * i], prescale), gpu::mul(y[2 * i + 1], prescale));
  }
  if constexpr (kValues == 8) {
    if (p.q.right_size % 8 == 0) {
      *reinterpret_cast<gpu::Vec*>(tile + half_offset(p, k)) = {{words[0], words[1], words[2], words[3]}};
      return;
    }
  }
  DLLMC_UNROLL
  for (int i = 0; i < kValues; i += 4) {
    *reinterpret_cast<FourHalves*>(tile + half_offset(p, k + i)) = {words[i / 2], words[i / 2 + 1]};
  }
}

// A team of warps that share a token, and this thread's place in it. Addresses that the compiler carried from token to
// token, or past another phase, would cost more registers than there are; they follow from a fresh place each time.
struct Team {
  int index, warps, warp, lane;
  DLLMC_DEVICE Team again() const { return {index, warps, gpu::fresh(warp), gpu::fresh(lane)}; }
  DLLMC_DEVICE int id() const { return warp * 32 + lane; }
  DLLMC_DEVICE int threads() const { return warps * 32; }
  DLLMC_DEVICE void sync() const { gpu::sync_some(1 + index, threads()); }
};

// The power of two that brings a token's values to halves, from a warp's share of the row; contains a team barrier.
DLLMC_DEVICE float find_prescale(const TileArgs& p, TileShared& s, const Team& team, const RowStats& mine) {
  TeamShared& shared = s.teams[team.index];
  if (team.lane == 0) shared.stats[team.warp] = mine;
  team.sync();
  RowStats all = {0.0f, 0.0f};
  if (team.lane < team.warps) all = shared.stats[team.lane];
  const float factor = norm_factor(p.q, reduce_sum(all.square_sum));
  float peak = reduce_max(all.peak);
  if (p.q.tac_block) {
    const float bias = team.lane < gpu::num_threads() / 32 ? s.bias_peak[team.lane] : 0.0f;
    peak = gpu::max(peak, gpu::div(reduce_max(bias), factor));
  }
  const int exponent = clamp(biased_exponent(peak), 1, 253);
  const float prescale = power_of_two(254 - exponent);
  if (team.id() == 0) {
    shared.unscale = gpu::mul(power_of_two(exponent), factor);
    shared.bias_scale = gpu::div(prescale, factor);
  }
  return prescale;
}

// Row m -> halves in [1, 2) at its peak: x * norm_weight * channel_scale times a power of two. The norm's factor goes
// into `unscale`. With TAC the peak is that of the row or of the bias, whichever is larger.
// A row is loaded in kParts parts; the last stays in registers as it was loaded, and its values are made a second time;
// the others are read again, from L2.
template <int kValues, int kVecs, int kParts>
DLLMC_DEVICE void load_token(const TileArgs& p, TileShared& s, const Team& team, int64_t m, unsigned char* tile) {
  RowLoads<kValues, kVecs> loads;
  const auto first_of = [&team](int v) { return (v * team.threads() + team.id()) * kValues; };
  float y[kValues];
  RowStats mine = {0.0f, 0.0f};
  DLLMC_UNROLL
  for (int part = 0; part < kParts; ++part) {
    loads.load(p.q, m, part * kVecs, team.id(), team.threads());
    DLLMC_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      loads.values(p.q, v, first_of(part * kVecs + v), y, mine.square_sum);
      DLLMC_UNROLL
      for (int i = 0; i < kValues; ++i) mine.peak = gpu::max(mine.peak, gpu::abs(y[i]));
    }
  }
  const float prescale = find_prescale(p, s, team, {reduce_max(mine.peak), reduce_sum(mine.square_sum)});
  DLLMC_UNROLL
  for (int part = kParts - 1; part >= 0; --part) {
    if (part < kParts - 1) loads.load(p.q, m, part * kVecs, team.id(), team.threads());
    DLLMC_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const int k = first_of(part * kVecs + v);
      if (k >= p.q.inner) break;
      loads.values(p.q, v, k, y, mine.square_sum);
      store_halves(p, tile, k, y, prescale);
    }
  }
}

struct TacMatrix {
  gpu::Vec even, odd;  // rows of outputs 4 (r / 2) + r % 2 and 2 more, columns 4 t..
};
DLLMC_DEVICE TacMatrix load_tac(const TileArgs& p, int lane, int block) {
  const int r = lane / 4, t = lane % 4;
  const float* matrix = p.q.tac_matrix + block * kTacBlock * kTacBlock + (4 * (r / 2) + r % 2) * kTacBlock + 4 * t;
  return {gpu::load_shared_reads(matrix), gpu::load_shared_reads(matrix + 2 * kTacBlock)};
}
// Two halves that add up to a float of at most 2 in magnitude, but for 2^-22 of it.
struct SplitPair {
  uint32_t high, low;
};
DLLMC_DEVICE SplitPair split(float first, float second) {
  const uint32_t high = gpu::pack_halves(first, second);
  return {high, gpu::pack_halves(gpu::sub(first, gpu::low_half(high)), gpu::sub(second, gpu::high_half(high)))};
}

// d += A (row[0..3] as a column of B), K in the order of TacMatrix.
DLLMC_DEVICE void multiply_tac(float (&d)[4], const uint32_t (&a)[4], const gpu::Vec& row, float scale) {
  float m[4];
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) m[i] = gpu::mul(from_bits(row.v[i]), scale);
  const SplitPair first = split(m[0], m[1]), second = split(m[2], m[3]);
  gpu::mma_half(d, a, {first.low, second.low});
  gpu::mma_half(d, a, {first.high, second.high});
}

// Exponent of a TAC block's peak.
DLLMC_DEVICE int tac_exponent(const TacMatrix& matrix) {
  float peak = 0.0f;
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) {
    peak = gpu::max(peak, gpu::max(gpu::abs(from_bits(matrix.even.v[i])), gpu::abs(from_bits(matrix.odd.v[i]))));
  }
  return clamp(biased_exponent(reduce_max(peak)), 1, 253);
}

// One TAC block of all tokens in place; returns the largest magnitude this lane left. Tokens are the rows of A, of
// which 8 are used. K is read as 4 t.. and outputs are numbered so that a lane writes the four halves that it read.
DLLMC_DEVICE float compensate_block(const TileArgs& p, const TacMatrix& matrix, int lane, int block, float bias_scale,
                                    unsigned char* tiles) {
  const int token = lane / 4, k = block * kTacBlock + 4 * (lane % 4);
  const int exponent = tac_exponent(matrix);
  const float scale = power_of_two(254 - exponent), grown = power_of_two(exponent);
  FourHalves* halves = reinterpret_cast<FourHalves*>(tiles + token * p.token_bytes + half_offset(p, k));
  FourHalves x = {0, 0};
  if (token < p.tokens) x = *halves;
  const uint32_t a[4] = {x.low, 0, x.high, 0};
  float first[4] = {}, second[4] = {};
  multiply_tac(first, a, matrix.even, scale);
  multiply_tac(second, a, matrix.odd, scale);
  const gpu::Vec bias = gpu::load_shared_reads(p.q.tac_bias + k);
  const float sums[4] = {first[0], first[1], second[0], second[1]};
  float y[4], peak = 0.0f;
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) {
    y[i] = finite_half(gpu::fma(sums[i], grown, gpu::mul(from_bits(bias.v[i]), bias_scale)));
    peak = gpu::max(peak, gpu::abs(y[i]));
  }
  if (token < p.tokens) *halves = {gpu::pack_halves(y[0], y[1]), gpu::pack_halves(y[2], y[3])};
  return peak;
}

// TAC of all tokens of the block, whose warps take turns at the blocks of 16 channels; the matrices come from L2, four
// of a warp under way at a time. Leaves each token's peak in compensated_peak. The block's barriers stand around it.
DLLMC_DEVICE void compensate(const TileArgs& p, TileShared& s, unsigned char* tiles) {
  constexpr int kAhead = 4;
  const int lane = gpu::fresh(gpu::lane()), token = lane / 4, warps = gpu::num_threads() / 32,
            blocks = p.q.inner / kTacBlock;
  const float bias_scale = token < p.tokens ? s.teams[token].bias_scale : 0.0f;
  float peak = 0.0f;
  for (int first = gpu::warp(); first < blocks; first += kAhead * warps) {
    TacMatrix matrices[kAhead];
    DLLMC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int block = first + i * warps;
      matrices[i] = load_tac(p, lane, block < blocks ? block : first);
    }
    DLLMC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int block = first + i * warps;
      if (block < blocks) peak = gpu::max(peak, compensate_block(p, matrices[i], lane, block, bias_scale, tiles));
    }
  }
  peak = gpu::max(peak, gpu::shuffle_xor(peak, 1));
  peak = gpu::max(peak, gpu::shuffle_xor(peak, 2));
  if (token < kMaxTeams && lane % 4 == 0) s.compensated_peak[gpu::warp()][token] = peak;
}

// Tile <- tile right * lift, in place: a warp reads its strips of 16 rows into registers before it writes them.
template <int kBTiles, int kStrips>
DLLMC_DEVICE void multiply_right(const TileArgs& p, const Team& team, const gpu::Vec* right, float lift,
                                 unsigned char* tile) {
  const int lane = team.lane, r = lane / 4, t = lane % 4;
  for (int strip = team.warp * kStrips; strip < p.a_tiles; strip += team.warps * kStrips) {
    uint32_t a[kStrips][kBTiles][4] = {};
    DLLMC_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      DLLMC_UNROLL
      for (int k = 0; k < kBTiles; ++k) {
        if (strip + s < p.a_tiles && k < p.b_tiles) {
          gpu::load_matrices(a[s][k], tile + ((strip + s) * 16 + lane % 16) * p.pitch + (k * 16 + lane / 16 * 8) * 2);
        }
      }
    }
    gpu::sync_warp();
    for (int n = 0; n < p.b_tiles; ++n) {
      float y[kStrips][2][4] = {};
      DLLMC_UNROLL
      for (int k = 0; k < kBTiles; ++k) {
        if (k >= p.b_tiles) break;
        const gpu::Vec b = right[(n * p.b_tiles + k) * 32 + lane];
        DLLMC_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          if (strip + s >= p.a_tiles) break;
          gpu::mma_half(y[s][0], a[s][k], {b.v[0], b.v[1]});
          gpu::mma_half(y[s][1], a[s][k], {b.v[2], b.v[3]});
        }
      }
      DLLMC_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        if (strip + s >= p.a_tiles) break;
        unsigned char* row = tile + ((strip + s) * 16 + r) * p.pitch + (n * 16 + 2 * t) * 2;
        DLLMC_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float (&d)[4] = y[s][h];
          uint32_t* at = reinterpret_cast<uint32_t*>(row + h * 16);
          *at = gpu::pack_halves(gpu::mul(d[0], lift), gpu::mul(d[1], lift));
          at[p.pitch * 2] = gpu::pack_halves(gpu::mul(d[2], lift), gpu::mul(d[3], lift));
        }
      }
    }
  }
}

// z = left^T tile for the warp's strips of 16 columns: z[i][j] is rows 16 i.., columns 8 j.. of them.
template <int kATiles, int kStrips>
DLLMC_DEVICE void multiply_left(const TileArgs& p, const Team& team, const gpu::Vec* left, const unsigned char* tile,
                                float (&z)[kATiles][2 * kStrips][4]) {
  const int lane = team.lane;
  for (int k = 0; k < p.a_tiles; ++k) {
    uint32_t b[kStrips][4] = {};
    DLLMC_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      const int strip = team.warp * kStrips + s;
      if (strip >= p.b_tiles) break;
      gpu::load_matrices_transposed(b[s], tile + (k * 16 + lane % 16) * p.pitch + (strip * 16 + lane / 16 * 8) * 2);
    }
    DLLMC_UNROLL
    for (int i = 0; i < kATiles; ++i) {
      if (i >= p.a_tiles) break;
      const gpu::Vec words = left[(i * p.a_tiles + k) * 32 + lane];
      const uint32_t a[4] = {words.v[0], words.v[1], words.v[2], words.v[3]};
      DLLMC_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        gpu::mma_half(z[i][2 * s], a, {b[s][0], b[s][1]});
        gpu::mma_half(z[i][2 * s + 1], a, {b[s][2], b[s][3]});
      }
    }
  }
}

}  // namespace dllmc
