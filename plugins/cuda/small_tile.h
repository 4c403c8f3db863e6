// Products of few tokens (at most 64) with a whole weight matrix: the loop that linear_small.cu and head.cu share.
// Its time is that of reading the weights once, so everything serves the bytes in flight.
//
// Tile: a block of 8 warps makes units of 16 * kTiles outputs x all tokens. The warps split K: warp w takes K tiles
// w, w + 8, ... (with groups: groups w, w + 8, ...), so that a block reads 8 KB side by side and no warp reads what
// another does. Blocks stay: the grid gives each SM two of them, and each walks through its share of the units.
// Weights: global -> registers, the operand as it stands in memory, through a ring of 4 tiles a warp (2 with groups).
// The ring runs on across units: while sums meet, the next unit's weights are under way. In flight: 1 KB x 4 x 8 warps
// x 2 blocks = 64 KB an SM. An H200 needs 4.3 TB/s x 0.8 us / 132 = 26 KB, an Orin 150 GB/s x 0.7 us / 16 = 7 KB.
// Activations: global -> registers, 16 bytes a lane are a B operand, loaded a few columns ahead. Every unit wants the
// same ones, so they come from L1, where weights do not allocate, and L2 sends them once to each SM. At 32 tokens that
// is as much as the weights of an SM that has two units (4096 outputs on an H200): L2 then sends two bytes for one of
// memory. L1 sends 2 / kTiles bytes for one of weights; kTiles 2 is for matrices wide enough to fill the SMs with it.
// Sums: 32-bit integers, so their order does not matter. Each warp leaves its own in shared memory; after a barrier a
// thread adds 8 of them and owns two neighbouring outputs of a token, the same token in every unit.
#pragma once

#include "format.h"

namespace dllmc {

constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = 32 * kSmallWarps;

struct SmallProduct {
  const int8_t* codes;   // the first token's
  const int8_t* weight;  // layout 1
  int rows;              // tokens, at most 8 * kColumns
  int row_bytes;         // of a token's codes
  int n_tiles, k_tiles;  // weight tiles along N and K
  int group_tiles;       // K tiles whose sum is wanted by itself; 1 without groups
};

struct alignas(8) SumPair {  // sums of outputs n (even) and n + 1 of a token
  int32_t first, second;
};

// The sums of a unit as pairs, and where they stand in shared memory: pair i of warp w at w * kPairs + i.
template <int kColumns, int kTiles>
struct UnitPairs {
  static constexpr int kTilePairs = 64 * kColumns;
  static constexpr int kPairs = kTilePairs * kTiles;
  static constexpr int kOwned = (kPairs + kSmallThreads - 1) / kSmallThreads;  // pairs a thread adds up
  static constexpr int kBytes = kSmallWarps * kPairs * static_cast<int>(sizeof(SumPair));

  // Pair i of a unit belongs to this token and to these outputs, counted from the unit's first.
  static DLLMC_DEVICE int token(int i) { return i % kTilePairs / 64 * 8 + i % 4 * 2 + i / 32 % 2; }
  static DLLMC_DEVICE int output(int i) { return i / kTilePairs * kTileOutputs + i % 32 / 4 * 2; }

  static DLLMC_DEVICE void write(SumPair* sums, const int32_t (&acc)[kTiles][kColumns][4]) {
    SumPair* own = sums + gpu::warp() * kPairs + gpu::lane();
    DLLMC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      DLLMC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int32_t(&d)[4] = acc[n][c];
        own[(n * kColumns + c) * 64] = {d[0], d[2]};
        own[(n * kColumns + c) * 64 + 32] = {d[1], d[3]};
      }
    }
  }
};

// kColumns groups of 8 tokens, kTiles tiles of 16 outputs in a unit.
template <class Format, int kColumns, int kTiles, bool kGrouped>
class SmallTile {
 public:
  // What registers allow: with groups, sums of 64 tokens and a thread's float sums take those of two blocks.
  static constexpr int kBlocksPerSm = kGrouped && kColumns > 4 ? 1 : 2;
  using Sums = int32_t[kTiles][kColumns][4];

  DLLMC_DEVICE explicit SmallTile(const SmallProduct& p) : p_(p) {
    const int rounds = (p.k_tiles / p.group_tiles + kSmallWarps - 1) / kSmallWarps;
    steps_ = rounds * p.group_tiles;
    weight_ = p.weight + 16 * gpu::lane();
    DLLMC_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int row = 8 * c + gpu::lane() / 4;  // tokens that are not there read another's codes; nobody stores them
      const int start = (row < p.rows ? row : p.rows - 1) * p.row_bytes + kLaneBytes * (gpu::lane() % 4);
      // Through a shuffle, so that the compiler keeps the number instead of making it again for each tile.
      row_[c] = gpu::shuffle(static_cast<uint32_t>(start), gpu::lane());
    }
  }

  // Sends for the first tiles of `unit`; run() follows, and in between there is time for something else.
  DLLMC_DEVICE void start(int unit) {
    DLLMC_UNROLL
    for (int slot = 0; slot < kRing; ++slot) load_weights(slot, unit, k_tile(slot));
    load_activations(0, k_tile(0), 0);
  }

  // For each unit of [unit, end): the products of all K tiles, then flush(sums, unit, 0); with groups
  // flush(sums, unit, round) after each round of a group per warp. All warps flush together.
  template <class Flush>
  DLLMC_DEVICE void run(int unit, int end, Flush& flush) {
    Sums sums = {};
    const int padded = (steps_ + kRing - 1) / kRing * kRing;  // a unit starts at slot 0 of the ring
    for (; unit < end; ++unit) {
      for (int base = 0; base < padded; base += kRing) {
        const bool last = base + kRing == padded;
        const int next_unit = last ? unit + 1 : unit, next_base = last ? 0 : base + kRing;
        DLLMC_UNROLL
        for (int slot = 0; slot < kRing; ++slot) {
          const int step = base + slot;
          const int next_step = slot + 1 < kRing ? step + 1 : next_base;
          multiply_tile(sums, slot, k_tile(step), k_tile(next_step));
          if (next_unit < end) load_weights(slot, next_unit, k_tile(next_base + slot));
          if constexpr (kGrouped) {
            if (step < steps_ && (step + 1) % p_.group_tiles == 0) flush_sums(sums, unit, step / p_.group_tiles, flush);
          }
        }
      }
      if constexpr (!kGrouped) flush_sums(sums, unit, 0, flush);
    }
  }

 private:
  static constexpr int kRing = kTiles > 1 || (kGrouped && kBlocksPerSm > 1) ? 2 : 4;  // K tiles a warp has in flight
  static constexpr int kLaneBytes = Format::kActivationBytes / 4;
  static constexpr int kVecs = kLaneBytes / 16;  // 16-byte loads a lane, tile and column
  // Such loads that a buffer of activations holds: as many as registers allow.
  static constexpr int kHeld = kColumns > 4 || kTiles > 1 || kGrouped ? 2 : 4;
  static constexpr int kChunk = kColumns * kVecs < kHeld ? kColumns : kHeld / kVecs;  // columns loaded at once
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kColumns % kChunk == 0 && kRing * kChunks % 2 == 0, "the two buffers of activations alternate");

  // This warp's K tile at a step, at least k_tiles where it has none.
  DLLMC_DEVICE int k_tile(int step) const {
    if constexpr (!kGrouped) return step * kSmallWarps + gpu::warp();
    const int round = step / p_.group_tiles;
    return (round * kSmallWarps + gpu::warp()) * p_.group_tiles + step - round * p_.group_tiles;
  }

  DLLMC_DEVICE void load_weights(int slot, int unit, int k) {
    if (k >= p_.k_tiles) return;
    DLLMC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int n_tile = kTiles > 1 && unit * kTiles + n >= p_.n_tiles ? p_.n_tiles - 1 : unit * kTiles + n;
      const int8_t* tile = weight_ + static_cast<int64_t>(n_tile * p_.k_tiles + k) * kTileStride;
      ring_[slot][n][0] = gpu::load_once(tile);
      ring_[slot][n][1] = gpu::load_once(tile + kTileStride / 2);
    }
  }

  DLLMC_DEVICE void load_activations(int buffer, int k, int chunk) {
    if (k >= p_.k_tiles) return;
    const uint32_t tile = static_cast<uint32_t>(k * Format::kActivationBytes);
    DLLMC_UNROLL
    for (int c = 0; c < kChunk; ++c) {
      DLLMC_UNROLL
      for (int i = 0; i < kVecs; ++i) {
        const gpu::Vec x = gpu::load_shared_reads(p_.codes + (tile + row_[chunk * kChunk + c]) + 16 * i);
        DLLMC_UNROLL
        for (int j = 0; j < 4; ++j) activations_[buffer][c][4 * i + j] = x.v[j];
      }
    }
  }

  // Adds K tile `k`, whose weights stand in `slot`, and fetches the activations of tile `next` on the way.
  DLLMC_DEVICE void multiply_tile(Sums& sums, int slot, int k, int next) {
    DLLMC_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int buffer = (slot * kChunks + chunk) % 2;
      if (chunk + 1 < kChunks) {
        load_activations(1 - buffer, k, chunk + 1);
      } else {
        load_activations(1 - buffer, next, 0);
      }
      if (k < p_.k_tiles) multiply_chunk(sums, slot, chunk, buffer);
    }
  }

  DLLMC_DEVICE void multiply_chunk(Sums& sums, int slot, int chunk, int buffer) {
    DLLMC_UNROLL
    for (int step = 0; step < 2; ++step) {
      typename Format::Weight weight[kTiles];
      DLLMC_UNROLL
      for (int n = 0; n < kTiles; ++n) weight[n] = Format::weight(ring_[slot][n][step]);
      DLLMC_UNROLL
      for (int c = 0; c < kChunk; ++c) {
        const auto x = Format::activation(activations_[buffer][c] + step * Format::kStepWords);
        DLLMC_UNROLL
        for (int n = 0; n < kTiles; ++n) Format::multiply(sums[n][chunk * kChunk + c], weight[n], x);
      }
    }
  }

  template <class Flush>
  static DLLMC_DEVICE void flush_sums(Sums& sums, int unit, int round, Flush& flush) {
    flush(sums, unit, round);
    DLLMC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      DLLMC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        DLLMC_UNROLL
        for (int i = 0; i < 4; ++i) sums[n][c][i] = 0;
      }
    }
  }

  const SmallProduct p_;
  const int8_t* weight_;    // at this lane's bytes
  int steps_;               // of a warp through K
  uint32_t row_[kColumns];  // where this lane's bytes of its tokens start
  gpu::Vec ring_[kRing][kTiles][2];
  uint32_t activations_[2][kChunk][4 * kVecs];
};

// The units of one of `parts` even shares.
struct Share {
  int begin, end;
};
DLLMC_DEVICE Share share_of(int units, int part, int parts) {
  const unsigned all = static_cast<unsigned>(units), i = static_cast<unsigned>(part), n = static_cast<unsigned>(parts);
  return {static_cast<int>(i * all / n), static_cast<int>((i + 1) * all / n)};
}

// Blocks that share `units` evenly, at most blocks_per_sm on an SM and none with more units than it must have.
inline int small_grid(int units, int num_sms, int blocks_per_sm) {
  const int slots = num_sms * blocks_per_sm;
  const int share = (units + slots - 1) / slots;
  return (units + share - 1) / share;
}

}  // namespace dllmc
