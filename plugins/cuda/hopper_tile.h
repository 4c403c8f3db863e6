// What the warps of a Hopper block do: linear_hopper.cu says who they are and why.
#pragma once

#include "hopper.h"
#include "hopper_epilogue.h"
#include "linear.h"

namespace dllmc::hopper {

constexpr int kOutputs = 128;
constexpr int kThreads = 384, kGroupThreads = 128;
constexpr int kConsumerWarps = 8, kProducerWarps = 4, kGroupWarps = 4;
constexpr int kStageCodes = 128;
constexpr int kRegisters = 168;  // of a thread when a block starts: 64 K / 384, a multiple of 8
constexpr int kConsumerRegisters = 200, kProducerRegisters = 104;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * kRegisters, "registers of a block");
constexpr int kTables = 4;  // of tokens: two for each warpgroup of consumers

template <class Format, int kTokens>
struct Shared {
  static constexpr int kTiles = kStageCodes / Format::kCodesPerTile;  // weight tiles of a stage along K
  static constexpr int kOperand = kTokens * kStageCodes;
  static constexpr int kTileRow = kTiles * kTileStride;  // 16 outputs of a stage
  static constexpr int kStage = kOperand + kOutputs / kTileOutputs * kTileRow;
  static constexpr int kTableBytes = kTables * kTokens * static_cast<int>(sizeof(Token));
  static constexpr int kMaxBytes = 227 * 1024, kMaxStages = 8;
  static constexpr int kFit = (kMaxBytes - kTableBytes - 2 * kMaxStages * 8) / kStage;
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  static constexpr int kBytes = kStages * kStage + kTableBytes + 2 * kStages * 8;

  static DLLMC_DEVICE unsigned char* operand(int stage) { return gpu::shared() + stage * kStage; }
  static DLLMC_DEVICE unsigned char* weights(int stage) { return operand(stage) + kOperand; }
  static DLLMC_DEVICE Token* tokens(int table) {
    return reinterpret_cast<Token*>(gpu::shared() + kStages * kStage) + table * kTokens;
  }
  static DLLMC_DEVICE gpu::Barrier* full(int stage) {
    return reinterpret_cast<gpu::Barrier*>(gpu::shared() + kStages * kStage + kTableBytes) + stage;
  }
  static DLLMC_DEVICE gpu::Barrier* empty(int stage) { return full(kStages + stage); }
};

// A place in the ring of stages.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  DLLMC_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// A block's tiles, one after the other: all tokens of 128 outputs first, so that weights come from memory once.
template <int kTokens>
struct Tiles {
  const LinearArgs& p;
  int tile = gpu::block_x();

  DLLMC_DEVICE int num_token_tiles() const { return (static_cast<int>(p.rows) + kTokens - 1) / kTokens; }
  DLLMC_DEVICE bool valid() const { return tile < num_token_tiles() * ((p.outputs + kOutputs - 1) / kOutputs); }
  DLLMC_DEVICE void advance() { tile += gpu::grid_x(); }
  DLLMC_DEVICE int first_token() const { return tile % num_token_tiles() * kTokens; }
  DLLMC_DEVICE int first_output() const { return tile / num_token_tiles() * kOutputs; }
};

DLLMC_DEVICE int num_stages(const LinearArgs& p) { return (p.inner + kStageCodes - 1) / kStageCodes; }

// The words of one step of a token, in the order of the products.
DLLMC_DEVICE void spread(uint32_t* words, const WideActivation& x) {
  words[0] = x.low[0];
  words[1] = x.low[1];
  words[2] = x.high[0];
  words[3] = x.high[1];
}
DLLMC_DEVICE void spread(uint32_t* words, const Int8::Activation& x) {
  words[0] = x.b[0];
  words[1] = x.b[1];
}

// A warp fills every fourth stage by itself: while one waits for memory, the others write. Nothing is loaded between
// its writes and their fence, which may wait for loads, too.
template <class Format, int kTokens>
struct Producer {
  using S = Shared<Format, kTokens>;
  static constexpr int kTiles = S::kTiles, kSteps = 2 * kTiles;
  static constexpr int kTokenBytes = Format::kActivationBytes * kTiles;  // of a stage
  static constexpr int kVecs = kTokenBytes / 64, kVecsOfTile = kVecs / kTiles;
  // Lanes 4 r to 4 r + 3 share tokens r, r + 8, ...; two batches of them are under way.
  static constexpr int kTokensAtOnce = 8;
  static constexpr int kRows = kTokens == 64 ? 4 : 8 / kVecs;
  static constexpr int kBatches = kTokens / kTokensAtOnce / kRows;
  static_assert(kBatches % 2 == 0, "batches come in pairs");

  struct Row {
    gpu::Vec v[kVecs];
  };

  const LinearArgs& p;
  const int lane = gpu::lane(), r = lane / 4, t = lane % 4;
  const int stages = num_stages(p);
  const int row_bytes = p.inner / Format::kCodesPerTile * Format::kActivationBytes;
  Row even[kRows], odd[kRows];
  Tiles<kTokens> tiles{p};
  int k = gpu::warp() - kConsumerWarps;  // stage of the tile
  int stage = k;                         // of the ring
  uint32_t parity = 1;
  int first_token = 0, first_output = 0;  // of the tile
  int last_token = 0;                     // from the first on
  const int8_t* codes = nullptr;         // the lane's of the tile's first token

  DLLMC_DEVICE explicit Producer(const LinearArgs& args) : p(args) { enter_tile(); }

  DLLMC_DEVICE void enter_tile() {
    for (; k >= stages && tiles.valid(); tiles.advance()) k -= stages;
    first_token = tiles.first_token();
    first_output = tiles.first_output();
    last_token = smaller(static_cast<int>(p.rows) - first_token, kTokens) - 1;
    codes = p.codes + static_cast<int64_t>(first_token) * row_bytes + t * kVecsOfTile * 16;
  }
  DLLMC_DEVICE void advance() {
    stage += kProducerWarps;
    if (stage >= S::kStages) {
      stage -= S::kStages;
      parity ^= 1;
    }
    k += kProducerWarps;
    if (k >= stages) enter_tile();
  }

  // Tokens behind the last read as the last: their sums are never stored. K of 8-bit codes may end in half a stage.
  DLLMC_DEVICE void load(Row (&rows)[kRows], int batch) {
    const bool whole = (k + 1) * kStageCodes <= p.inner;
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int token = smaller((batch * kRows + i) * kTokensAtOnce + r, last_token);
      const int8_t* row = codes + token * row_bytes + k * kTokenBytes;
      DLLMC_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        const bool inside = v < kVecsOfTile || whole;
        const int offset = v / kVecsOfTile * Format::kActivationBytes + v % kVecsOfTile * 16;
        rows[i].v[v] = inside ? gpu::load_shared_reads(row + offset) : gpu::Vec{};
      }
    }
  }

  DLLMC_DEVICE void store(const Row (&rows)[kRows], int batch) {
    unsigned char* token = S::operand(stage) + (batch * kRows * kTokensAtOnce + r) * kStageCodes + 4 * t;
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
      uint32_t words[8];
      DLLMC_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int word = step * Format::kStepWords;
        spread(words + 8 / kSteps * step, Format::activation(&rows[i].v[word / 4].v[word % 4]));
      }
      DLLMC_UNROLL
      for (int c = 0; c < 8; ++c) {
        gpu::write_operand(token + ((c ^ r) << 4) + i * kTokensAtOnce * kStageCodes, words[c]);
      }
    }
  }

  // A lane copies the stage's weights of 16 outputs.
  DLLMC_DEVICE void copy_weights() {
    const int num_rows = smaller(kOutputs, p.outputs - first_output) / kTileOutputs;
    const int num_tiles_k = p.inner / Format::kCodesPerTile;
    const int bytes = smaller(kTiles, num_tiles_k - k * kTiles) * kTileStride;
    gpu::Barrier* full = S::full(stage);
    if (lane == 0) gpu::expect_bytes(full, num_rows * bytes);
    gpu::sync_warp();
    if (lane >= num_rows) return;
    const int64_t tile = static_cast<int64_t>(first_output / kTileOutputs + lane) * num_tiles_k + k * kTiles;
    gpu::copy_bulk(S::weights(stage) + lane * S::kTileRow, p.weight + tile * kTileStride, bytes, full);
  }

  // The epilogue will read the tile's residuals: a stage's lanes ask for those of 32 tokens.
  DLLMC_DEVICE void prefetch_residual() {
    const int token = k * 32 + lane, size = p.residual_type == Type::kFloat32 ? 4 : 2;
    if (token > last_token) return;
    const int64_t output = static_cast<int64_t>(first_token + token) * p.outputs + first_output;
    const auto* residual = static_cast<const unsigned char*>(p.residual) + output * size;
    gpu::prefetch_bulk(residual, smaller(kOutputs, p.outputs - first_output) * size);
  }

  DLLMC_DEVICE void start() {
    load(even, 0);
    load(odd, 1);
  }
  DLLMC_DEVICE void fill() {
    gpu::wait(S::empty(stage), parity);
    copy_weights();
    DLLMC_ROLL
    for (int batch = 0; batch < kBatches; batch += 2) {
      store(even, batch);
      if (batch + 2 < kBatches) load(even, batch + 2);
      store(odd, batch + 1);
      if (batch + 2 < kBatches) load(odd, batch + 3);
    }
    gpu::publish_operand();
    gpu::sync_warp();
    if (lane == 0) gpu::arrive(S::full(stage));
    if (p.residual) prefetch_residual();
  }

  DLLMC_DEVICE void run() {
    if (tiles.valid()) start();
    while (tiles.valid()) {
      fill();
      advance();
      if (tiles.valid()) start();
    }
  }
};

// A registers of two products, half a stage.
struct Weights {
  uint32_t a[2][4];
};
DLLMC_DEVICE void place(Weights& w, int, const WideWeight& x) {
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) {
    w.a[0][i] = x.low[i];
    w.a[1][i] = x.high[i];
  }
}
DLLMC_DEVICE void place(Weights& w, int step, const Int8::Weight& x) {
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) w.a[step][i] = x.a[i];
}

template <class Format, int kTokens>
struct Products {
  using S = Shared<Format, kTokens>;
  static constexpr int kSums = kTokens / 2;

  Cursor<S::kStages> next;  // stage to issue
  const int lane = gpu::lane(), warp = gpu::warp();

  // Starts the products of half a stage.
  DLLMC_DEVICE void issue(int32_t (&sums)[kSums], Weights& weights, int half, bool accumulate) {
    constexpr int kSteps = S::kTiles;
    const unsigned char* tile = S::weights(next.stage) + warp * S::kTileRow + lane * 16;
    DLLMC_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const unsigned char* step = tile + (half * kSteps + i) * (kTileStride / 2);
      place(weights, i, Format::weight(*reinterpret_cast<const gpu::Vec*>(step)));
    }
    const gpu::Descriptor operand = gpu::descriptor(S::operand(next.stage));
    gpu::begin_products();
    DLLMC_UNROLL
    for (int q = 0; q < 2; ++q) {
      gpu::multiply_async(sums, weights.a[q], operand + 2 * (2 * half + q), accumulate || q > 0);
    }
    gpu::commit_products();
  }

  // Ends the products that these weights are in, which `kLater` half stages follow.
  template <int kLater>
  DLLMC_DEVICE void retire(Weights& weights) {
    gpu::wait_products<kLater>();
    gpu::settle(weights.a[0]);
    gpu::settle(weights.a[1]);
  }
  DLLMC_DEVICE void release(int stage) {
    if (lane == 0) gpu::arrive(S::empty(stage));
  }

  // sums = the products of the next `count` stages.
  DLLMC_DEVICE void run(int32_t (&sums)[kSums], int count) {
    Weights first, second;
    gpu::wait(S::full(next.stage), next.parity);
    issue(sums, first, 0, false);
    issue(sums, second, 1, true);
    retire<1>(first);
    for (int i = 1; i < count; ++i) {
      const int before = next.stage;
      next.advance();
      gpu::wait(S::full(next.stage), next.parity);
      issue(sums, first, 0, true);
      retire<1>(second);
      release(before);
      issue(sums, second, 1, true);
      retire<1>(first);
    }
    retire<0>(second);
    release(next.stage);
    next.advance();
    gpu::settle(sums);
  }
};

// Scales and zeros of the tile's tokens, on their way from memory into a table of the warpgroup while products run.
template <int kTokens>
struct TokenColumn {
  static constexpr int kOfThread = kTokens > kGroupThreads ? kTokens / kGroupThreads : 1;
  const int first = gpu::thread() % kGroupThreads;
  Token tokens[kOfThread];

  DLLMC_DEVICE TokenColumn(const LinearArgs& p, int first_token, int group, int num_groups) {
    DLLMC_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      const int row = smaller(first_token + first + i * kGroupThreads, static_cast<int>(p.rows) - 1);
      const int64_t column = p.a_group ? static_cast<int64_t>(row) * num_groups + group : row;
      tokens[i] = {p.scale[column], p.zero ? p.zero[column] : 0};
    }
  }
  DLLMC_DEVICE void store(Token* table) const {
    DLLMC_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      if (first < kTokens) table[first + i * kGroupThreads] = tokens[i];
    }
  }
};

template <class Format, int kTokens, bool kGrouped>
DLLMC_DEVICE void consume(const LinearArgs& p) {
  using S = Shared<Format, kTokens>;
  Products<Format, kTokens> products;
  const int column = products.lane % 4 * 2, warpgroup = products.warp / kGroupWarps;
  const int count = kGrouped ? num_groups(p) : 1, stages = kGrouped ? group_size(p) / kStageCodes : num_stages(p);
  int table = warpgroup * 2;
  for (Tiles<kTokens> tiles{p}; tiles.valid(); tiles.advance()) {
    const int m = tiles.first_token(), n = tiles.first_output() + products.warp * kTileOutputs + products.lane / 4 * 2;
    Epilogue<kTokens> epilogue{p, m + column, n, {}};
    for (int group = 0; group < count; ++group, table ^= 1) {
      const TokenColumn<kTokens> of_tokens(p, m, group, count);
      const OutputPair of_outputs(p, n, group, count);
      int32_t sums[kTokens / 2];
      products.run(sums, stages);
      // Whoever writes a table has passed the barrier of the other one, behind all reading of this one.
      of_tokens.store(S::tokens(table));
      gpu::sync_some(1 + warpgroup, kGroupThreads);
      const Token* tokens = S::tokens(table) + column;
      epilogue.template add_group<Format::kShift, kGrouped>(sums, of_outputs, tokens, group == 0);
      if (kGrouped && !p.a_group && group == count - 1) epilogue.scale_tokens(epilogue.y, tokens);
    }
    if (n < p.outputs) epilogue.store();
  }
}

}  // namespace dllmc::hopper
