// What a block of linear_large.cu holds: its tile, the copies that feed it, and the registers of a warp.
#pragma once

#include <cstring>

#include "epilogue.h"
#include "format.h"

namespace dllmc::large {

constexpr int kThreads = 128;                  // 2 x 2 warps
constexpr int kChunk = 16;                     // bytes of a copy
constexpr int kPassBytes = kThreads * kChunk;  // what the block copies with one instruction a thread
constexpr int kPanel = 8;                      // token tiles that run side by side

template <class Format_, int kTokens_, int kOutputs_, bool kGrouped_>
struct Tile {
  using Format = Format_;
  static constexpr int kTokens = kTokens_, kOutputs = kOutputs_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kWarpTokens = kTokens / 2, kWarpOutputs = kOutputs / 2;
  static constexpr int kColumns = kWarpTokens / 8;             // products of 8 tokens
  static constexpr int kRows = kWarpOutputs / kTileOutputs;    // weight tiles
  static constexpr int kVecs = Format::kActivationBytes / 64;  // loads of 16 bytes that make a lane's token
  static constexpr int kWeightBytes = kOutputs * kTileBytes;
  static constexpr int kTokenBytes = kTokens * Format::kActivationBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStages = kVecs == 2 ? 2 : 3;
  static constexpr int kWeightPasses = kWeightBytes / kPassBytes, kTokenPasses = kTokenBytes / kPassBytes;
  static constexpr int kPasses = kWeightPasses + kTokenPasses;
  static constexpr int kBlocksPerSm = kTokens * kOutputs <= 64 * 64 ? 4 : 2;
  static_assert(kColumns % 2 == 0, "the two token buffers swap an even number of times a tile");
};

// Group sums below 2^22 in magnitude become floats by one exact subtraction: the integer in the low bits of 1.5 * 2^23.
// Sums of 4 x 4 bits are (kMaxGroup); they begin at that pattern where they need no shift. Others are converted.
template <class Format>
struct GroupSum {
  static constexpr bool kSmall = Format::kActivationBytes == 64 && Format::kCodesPerTile == 128;
  static constexpr int32_t kPattern = 0x4B400000;
  static constexpr int32_t kOrigin = kSmall && Format::kShift == 0 ? kPattern : 0;
  static DLLMC_DEVICE float value(int32_t sum) {
    if constexpr (kSmall) {
      const int32_t bits = kOrigin ? sum : (sum >> Format::kShift) + kPattern;
      float pattern;
      std::memcpy(&pattern, &bits, 4);
      return gpu::sub(pattern, 12582912.0f);
    } else {
      return gpu::from_int(sum >> Format::kShift);
    }
  }
};

struct Corner {
  int64_t token;
  int output;
};

// Where this block's tile begins: kPanel token tiles of one output tile, then of the next, so that what a wave of
// blocks reads of both operands is small enough for L2.
template <class Tile>
DLLMC_DEVICE Corner block_corner(const LinearArgs& p) {
  const int token_tiles = static_cast<int>((p.rows + Tile::kTokens - 1) / Tile::kTokens);
  const int output_tiles = (p.outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  const int panel = gpu::block_x() / (kPanel * output_tiles);
  const int inside = gpu::block_x() - panel * kPanel * output_tiles;
  const int left = token_tiles - panel * kPanel;
  const int width = left < kPanel ? left : kPanel;
  return {static_cast<int64_t>(panel * kPanel + inside % width) * Tile::kTokens, inside / width * Tile::kOutputs};
}

// What this thread copies of every stage: its chunk of each pass over the weights, then over the tokens.
template <class Tile>
struct Copies {
  static constexpr int kTokenChunks = Tile::kVecs * 4, kTokensPerPass = kThreads / kTokenChunks;

  const int8_t* weight;  // of pass 0 and the next stage to fill
  const int8_t* tokens;
  int64_t weight_step, token_step;  // bytes from one pass to the next
  int offset;                       // in the stage's tokens, pass 0
  uint32_t inside;                  // bit i: pass i lies inside the matrix

  DLLMC_DEVICE Copies(const LinearArgs& p, const Corner& corner) {
    const int tiles = p.inner / Tile::Format::kCodesPerTile;
    const int row = gpu::thread() / 64, token = gpu::thread() / kTokenChunks, chunk = gpu::thread() % kTokenChunks;
    const int64_t row_bytes = static_cast<int64_t>(tiles) * Tile::Format::kActivationBytes;
    weight_step = 2 * static_cast<int64_t>(tiles) * kTileStride;
    token_step = kTokensPerPass * row_bytes;
    weight = p.weight + static_cast<int64_t>(corner.output / kTileOutputs + row) * tiles * kTileStride +
             gpu::thread() % 64 * kChunk;
    tokens = p.codes + (corner.token + token) * row_bytes + chunk * kChunk;
    offset = (token * kTokenChunks + (Tile::kVecs == 2 ? chunk ^ (token & 1) : chunk)) * kChunk;
    inside = 0;
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kWeightPasses; ++i) {
      inside |= static_cast<uint32_t>(corner.output + (2 * i + row) * kTileOutputs < p.outputs) << i;
    }
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kTokenPasses; ++i) {
      const bool exists = corner.token + i * kTokensPerPass + token < p.rows;
      inside |= static_cast<uint32_t>(exists) << (Tile::kWeightPasses + i);
    }
  }

  DLLMC_DEVICE void start(unsigned char* stage, int pass) const {
    const bool valid = inside >> pass & 1u;
    if (pass < Tile::kWeightPasses) {
      gpu::copy_async(stage + pass * kPassBytes + gpu::thread() * kChunk, weight + pass * weight_step, valid);
    } else {
      const int token_pass = pass - Tile::kWeightPasses;
      unsigned char* to = stage + Tile::kWeightBytes + token_pass * kPassBytes + offset;
      gpu::copy_async(to, tokens + token_pass * token_step, valid);
    }
  }
  // The share of the stage that goes with products `column`: all is under way by half of them.
  DLLMC_DEVICE void start_share(unsigned char* stage, int column) const {
    constexpr int kShare = (Tile::kPasses + Tile::kColumns / 2 - 1) / (Tile::kColumns / 2);
    DLLMC_UNROLL
    for (int i = 0; i < kShare; ++i) {
      if (column * kShare + i < Tile::kPasses) start(stage, column * kShare + i);
    }
  }
  DLLMC_DEVICE void advance() {
    weight += kTileStride;
    tokens += Tile::Format::kActivationBytes;
  }
};

// A warp's quarter of the tile in registers, and where its operands stand in a stage.
template <class Tile>
struct Warp {
  using Format = typename Tile::Format;
  static constexpr int32_t kOrigin = Tile::kGrouped ? GroupSum<Format>::kOrigin : 0;

  int32_t sum[Tile::kRows][Tile::kColumns][4];
  float total[Tile::kGrouped ? Tile::kRows : 1][Tile::kColumns][4];  // of the groups so far
  gpu::Vec weight[Tile::kRows][2];                                   // steps
  gpu::Vec tokens[2][Tile::kVecs];                                   // the 8 in use and the next 8
  int row, column;  // first output and token in the block's tile
  int weights_at, tokens_at[Tile::kVecs];

  DLLMC_DEVICE Warp() {
    const int r = gpu::lane() / 4, t = gpu::lane() % 4;
    row = gpu::warp() % 2 * Tile::kWarpOutputs;
    column = gpu::warp() / 2 * Tile::kWarpTokens;
    weights_at = row * kTileBytes + gpu::lane() * kChunk;
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kVecs; ++i) {
      const int chunk = Tile::kVecs == 2 ? (2 * t + i) ^ (r & 1) : t;
      tokens_at[i] = Tile::kWeightBytes + (column + r) * Format::kActivationBytes + chunk * kChunk;
    }
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kRows; ++i) {
      DLLMC_UNROLL
      for (int j = 0; j < Tile::kColumns; ++j) {
        DLLMC_UNROLL
        for (int e = 0; e < 4; ++e) {
          sum[i][j][e] = kOrigin;
          if constexpr (Tile::kGrouped) total[i][j][e] = kNothing;
        }
      }
    }
  }

  DLLMC_DEVICE void load_weight(const unsigned char* stage, int i) {
    DLLMC_UNROLL
    for (int step = 0; step < 2; ++step) {
      const unsigned char* from = stage + weights_at + i * kTileStride + step * (kTileStride / 2);
      weight[i][step] = *reinterpret_cast<const gpu::Vec*>(from);
    }
  }
  DLLMC_DEVICE void load_tokens(const unsigned char* stage, int j) {
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kVecs; ++i) {
      const unsigned char* from = stage + tokens_at[i] + j * 8 * Format::kActivationBytes;
      tokens[j % 2][i] = *reinterpret_cast<const gpu::Vec*>(from);
    }
  }
  // The bits of a fragment's integer sums, of its totals with groups.
  DLLMC_DEVICE void copy_result(uint32_t (&bits)[4], int i, int j) const {
    if constexpr (Tile::kGrouped) {
      std::memcpy(bits, total[i][j], sizeof(bits));
    } else {
      std::memcpy(bits, sum[i][j], sizeof(bits));
    }
  }
  // The tile's operands, after which `weight` may be loaded anew.
  DLLMC_DEVICE void take_weights(typename Format::Weight (&operands)[Tile::kRows][2]) const {
    DLLMC_UNROLL
    for (int i = 0; i < Tile::kRows; ++i) {
      operands[i][0] = Format::weight(weight[i][0]);
      operands[i][1] = Format::weight(weight[i][1]);
    }
  }
  DLLMC_DEVICE typename Format::Activation activation(int j, int step) const {
    const int word = step * Format::kStepWords;
    return Format::activation(&tokens[j % 2][word / 4].v[word % 4]);
  }
};

}  // namespace dllmc::large
