// The integer linear for many tokens, through the tensor cores of a warp (mma.sync).
//
// A block of 2 x 2 warps owns a tile of y, each warp a quarter of it; K goes by in weight tiles, 64 bytes deep:
//   tokens x outputs   a warp     accumulators   blocks an SM
//   128 x 128          64 x 64    128            2   scales per channel
//    64 x  64          32 x 32     32            4   the same, where the larger tile would leave SMs idle
//    64 x 128          32 x 64     64 + 64       2   groups: a float sum beside the integer sum of the group
// Stages in shared memory, at most 48 KB a block on every device, are filled by cp.async kStages - 1 tiles ahead. One
// holds whole weight tiles (1 KB each, as they stand in memory) and the same K of the tokens. Both are operands as they
// are: a lane's 16 bytes come by one load, a warp's by 512 consecutive bytes, without bank conflicts. Only tokens of
// 128 bytes (8-bit activations, 4-bit weights) swap their 16-byte chunks by token & 1 to the same end.
//
// A warp holds a tile's weights in registers and streams its tokens past them, 8 at a time, the next 8 under way. The
// barrier between tiles stands before the last 8 tokens: the next tile's weights are loaded as this one's are used up,
// so that the tensor cores do not wait at a tile's edge.
//
// Balance of the main loop for a warp and tile, s4 on sm_80 to sm_89 as compiled: of 155 instructions 64 IMMA, 16 loads
// and 8 copies of 16 bytes, 1 barrier. An IMMA takes 8 cycles of an SM quarter on sm_80 and sm_87, 16 on sm_86 and
// sm_89, so at full rate issue slots are 30 % (15 %) busy; shared memory, which moves 48 KB for the block's 512 (1024)
// cycles, is 75 % (37 %) busy; L2 gives 32 (16) bytes a cycle to an SM. s8 from nibbles has twice the IMMAs and 3 more
// integer instructions for a pair. Groups add 4 or 5 instructions a sum: 440 to 500 slots for 32 IMMAs at 128 codes.
#include <type_traits>

#include "large_tile.h"
#include "linear.h"

namespace dllmc {
namespace large {

// The scales of one group; two tables behind the stages take turns.
template <class Tile>
struct GroupTable {
  float w_scale[Tile::kOutputs];
  int32_t w_sum[Tile::kOutputs];
  float scale[Tile::kTokens];
  int32_t zero[Tile::kTokens];
};

// A warp's sums on their way to y, 32 tokens at a time; the padding keeps the writes of fragments and the reads of rows
// free of bank conflicts.
template <class Tile>
struct Staging {
  static constexpr int kTokens = 32;
  uint32_t sums[kTokens][Tile::kWarpOutputs + 4];
};

template <class Tile>
constexpr int shared_bytes() {
  const size_t tables = Tile::kGrouped ? 2 * sizeof(GroupTable<Tile>) : 0;
  const size_t stages = Tile::kStages * Tile::kStageBytes + tables, staging = 4 * sizeof(Staging<Tile>);
  return static_cast<int>(stages > staging ? stages : staging);
}

// Scales of groups, one output's and one token's a thread: fetched in the group's first tile, in the table by its end.
template <class Tile>
struct Groups {
  using Table = GroupTable<Tile>;
  Table* tables;
  int num_groups, group = 0;
  int tiles, tiles_left;  // of a group, of this one
  float w_scale = 0, scale = 0;
  int32_t w_sum = 0, zero = 0;

  DLLMC_DEVICE Groups(const LinearArgs& p, unsigned char* shared)
      : tables(reinterpret_cast<Table*>(shared + Tile::kStages * Tile::kStageBytes)),
        num_groups(dllmc::num_groups(p)),
        tiles(group_size(p) / Tile::Format::kCodesPerTile),
        tiles_left(tiles) {}

  DLLMC_DEVICE void fetch(const LinearArgs& p, const Corner& corner) {
    if (tiles_left != tiles) return;
    const int last = p.outputs - 1, own = corner.output + gpu::thread();
    const int64_t n = own < last ? own : last, n_group = n * num_groups + group;
    const int64_t own_token = corner.token + gpu::thread();
    const int64_t m = own_token < p.rows ? own_token : p.rows - 1, m_group = m * num_groups + group;
    w_scale = p.w_scale[p.w_group ? n_group : n];
    if (p.a_group) scale = p.scale[m_group];
    if (p.zero) {
      w_sum = p.w_sum[n_group];
      zero = p.zero[p.a_group ? m_group : m];
    }
  }
  DLLMC_DEVICE void publish() {
    if (tiles_left != tiles) return;
    Table& table = tables[group & 1];
    if (gpu::thread() < Tile::kOutputs) {
      table.w_scale[gpu::thread()] = w_scale;
      table.w_sum[gpu::thread()] = w_sum;
    }
    if (gpu::thread() < Tile::kTokens) {
      table.scale[gpu::thread()] = scale;
      table.zero[gpu::thread()] = zero;
    }
  }
  // After a tile: at the group's end, total += scale * (w_scale * float(sum + zero * w_sum)).
  DLLMC_DEVICE void finish_tile(const LinearArgs& p, Warp<Tile>& warp) {
    if (--tiles_left) return;
    const Table& table = tables[group & 1];
    if (p.zero) add_zeros(warp, table);
    if (p.a_group) {
      add_terms<true>(warp, table);
    } else {
      add_terms<false>(warp, table);
    }
    ++group;
    tiles_left = tiles;
  }

 private:
  static DLLMC_DEVICE int first_output(const Warp<Tile>& warp, int i) {
    return warp.row + i * kTileOutputs + gpu::lane() / 4 * 2;
  }
  static DLLMC_DEVICE int first_token(const Warp<Tile>& warp, int j) {
    return warp.column + j * 8 + gpu::lane() % 4 * 2;
  }
  static DLLMC_DEVICE void add_zeros(Warp<Tile>& warp, const Table& table) {
    constexpr int kUnit = 1 << Tile::Format::kShift;
    DLLMC_UNROLL
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int32_t* zeros = &table.zero[first_token(warp, j)];
      DLLMC_UNROLL
      for (int i = 0; i < Tile::kRows; ++i) {
        const int32_t* w_sums = &table.w_sum[first_output(warp, i)];
        DLLMC_UNROLL
        for (int e = 0; e < 4; ++e) warp.sum[i][j][e] += zeros[e % 2] * w_sums[e / 2] * kUnit;
      }
    }
  }
  template <bool kScaled>  // by the token's scale of this group
  static DLLMC_DEVICE void add_terms(Warp<Tile>& warp, const Table& table) {
    DLLMC_UNROLL
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float* scales = &table.scale[first_token(warp, j)];
      DLLMC_UNROLL
      for (int i = 0; i < Tile::kRows; ++i) {
        const float* w_scales = &table.w_scale[first_output(warp, i)];
        DLLMC_UNROLL
        for (int e = 0; e < 4; ++e) {
          float term = gpu::mul(GroupSum<typename Tile::Format>::value(warp.sum[i][j][e]), w_scales[e / 2]);
          if constexpr (kScaled) term = gpu::mul(term, scales[e % 2]);
          warp.total[i][j][e] = gpu::add(warp.total[i][j][e], term);
          warp.sum[i][j][e] = Warp<Tile>::kOrigin;
        }
      }
    }
  }
};

// Starts all stages but the one that the first tile fills, and waits for the first.
template <class Tile>
DLLMC_DEVICE void fill_stages(Copies<Tile>& copies, int tiles, unsigned char* shared) {
  for (int k = 0; k < Tile::kStages - 1; ++k) {
    if (k >= tiles) copies.inside = 0;
    DLLMC_UNROLL
    for (int pass = 0; pass < Tile::kPasses; ++pass) copies.start(shared + k * Tile::kStageBytes, pass);
    copies.advance();
    gpu::commit_copies();
  }
  gpu::wait_copies<Tile::kStages - 2>();
  gpu::sync_block();
}

// All products of the tile; groups end in warp.total, others in warp.sum.
template <class Tile>
DLLMC_DEVICE void multiply(const LinearArgs& p, const Corner& corner, unsigned char* shared, Warp<Tile>& warp) {
  using Format = typename Tile::Format;
  constexpr int kStages = Tile::kStages, kLast = Tile::kColumns - 1;
  const int tiles = p.inner / Format::kCodesPerTile;
  Copies<Tile> copies(p, corner);
  Groups<Tile> groups(p, shared);
  fill_stages(copies, tiles, shared);
  DLLMC_UNROLL
  for (int i = 0; i < Tile::kRows; ++i) warp.load_weight(shared, i);
  warp.load_tokens(shared, 0);
  unsigned char* stage = shared;
  unsigned char* fill = shared + (kStages - 1) * Tile::kStageBytes;
  for (int k = 0; k < tiles; ++k) {
    typename Format::Weight weight[Tile::kRows][2];
    warp.take_weights(weight);
    if constexpr (Tile::kGrouped) groups.fetch(p, corner);
    if (k + kStages - 1 >= tiles) copies.inside = 0;
    unsigned char* next = stage + Tile::kStageBytes;
    if (next == shared + kStages * Tile::kStageBytes) next = shared;
    DLLMC_UNROLL
    for (int j = 0; j <= kLast; ++j) {
      if (j < kLast) {
        warp.load_tokens(stage, j + 1);
      } else {
        if constexpr (Tile::kGrouped) groups.publish();
        gpu::commit_copies();
        gpu::wait_copies<kStages - 2>();
        gpu::sync_block();
        warp.load_tokens(next, 0);
      }
      copies.start_share(fill, j);
      DLLMC_UNROLL
      for (int step = 0; step < 2; ++step) {
        const typename Format::Activation x = warp.activation(j, step);
        DLLMC_UNROLL
        for (int i = 0; i < Tile::kRows; ++i) {
          Format::multiply(warp.sum[i][j], weight[i][step], x);
          if (j == kLast && step == 1) warp.load_weight(next, i);
        }
      }
    }
    copies.advance();
    fill = stage;
    stage = next;
    if constexpr (Tile::kGrouped) groups.finish_tile(p, warp);
  }
}

// The values of a warp's row pairs from the staged sums: one pair of outputs a lane, kBatch tokens under way.
template <class Tile>
struct Rows {
  static constexpr int kLanes = Tile::kWarpOutputs / 2;  // that share a token
  static constexpr int kTogether = 32 / kLanes, kBatch = 8;

  OutputTerms first, second;
  int n, column;

  DLLMC_DEVICE Rows(const LinearArgs& p, const Corner& corner, const Warp<Tile>& warp) {
    column = gpu::lane() % kLanes * 2;
    n = corner.output + warp.row + column;
    if (n >= p.outputs) return;
    first = terms(p, n);
    second = terms(p, n + 1);
  }
  DLLMC_DEVICE void store(const LinearArgs& p, const Staging<Tile>& staging, int64_t first_token) const {
    for (int begin = gpu::lane() / kLanes; begin < Staging<Tile>::kTokens; begin += kBatch * kTogether) {
      TokenTerms token[kBatch];
      Pair residual[kBatch];
      DLLMC_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t m = first_token + begin + b * kTogether;
        if (m >= p.rows || n >= p.outputs) continue;
        token[b] = Tile::kGrouped ? TokenTerms{p.a_group ? 1.0f : p.scale[m], 0} : token_terms(p, m);
        residual[b] = read_residual(p, m, n);
      }
      DLLMC_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t m = first_token + begin + b * kTogether;
        if (m >= p.rows || n >= p.outputs) continue;
        const uint32_t* sums = &staging.sums[begin + b * kTogether][column];
        store_pair(p, {value(sums[0], first, token[b]), value(sums[1], second, token[b])}, residual[b], m, n);
      }
    }
  }

 private:
  static DLLMC_DEVICE OutputTerms terms(const LinearArgs& p, int n) {
    if constexpr (Tile::kGrouped) return {1.0f, p.bias ? p.bias[n] : kNothing, 0};
    return output_terms(p, n);
  }
  static DLLMC_DEVICE float value(uint32_t bits, const OutputTerms& n, const TokenTerms& m) {
    if constexpr (Tile::kGrouped) {
      float total;
      std::memcpy(&total, &bits, 4);
      return gpu::add(gpu::mul(total, m.scale), n.bias);
    } else {
      return channel_value(static_cast<int32_t>(bits) >> Tile::Format::kShift, n, m);
    }
  }
};

// A warp's sums -> y, through shared memory: rows of y are written whole, and the code is the same for every fragment.
template <class Tile>
DLLMC_DEVICE void store(const LinearArgs& p, const Corner& corner, unsigned char* shared, const Warp<Tile>& warp) {
  auto& staging = reinterpret_cast<Staging<Tile>*>(shared)[gpu::warp()];
  const Rows<Tile> rows(p, corner, warp);
  const int r = gpu::lane() / 4, t = gpu::lane() % 4;
  constexpr int kColumnsAtOnce = Staging<Tile>::kTokens / 8;
  gpu::wait_copies<0>();  // the zeros past the end of K land here, too
  gpu::sync_block();
  DLLMC_UNROLL
  for (int begin = 0; begin < Tile::kColumns; begin += kColumnsAtOnce) {
    DLLMC_UNROLL
    for (int j = 0; j < kColumnsAtOnce; ++j) {
      DLLMC_UNROLL
      for (int i = 0; i < Tile::kRows; ++i) {
        uint32_t bits[4];
        warp.copy_result(bits, i, begin + j);
        DLLMC_UNROLL
        for (int e = 0; e < 4; ++e) staging.sums[j * 8 + 2 * t + e % 2][i * kTileOutputs + 2 * r + e / 2] = bits[e];
      }
    }
    gpu::sync_warp();
    rows.store(p, staging, corner.token + warp.column + begin * 8);
    gpu::sync_warp();
  }
}

}  // namespace large

template <class Tile>
DLLMC_KERNEL(large::kThreads, Tile::kBlocksPerSm)
void linear_large(DLLMC_PARAM LinearArgs p) {
  if constexpr (!gpu::kHasInt4 && std::is_same_v<typename Tile::Format, Int4>) {
    gpu::trap();
  } else {
    const large::Corner corner = large::block_corner<Tile>(p);
    large::Warp<Tile> warp;
    large::multiply(p, corner, gpu::shared(), warp);
    large::store(p, corner, gpu::shared(), warp);
  }
}

namespace large {

template <class Tile>
int64_t num_blocks(const LinearArgs& p) {
  return (p.rows + Tile::kTokens - 1) / Tile::kTokens * ((p.outputs + Tile::kOutputs - 1) / Tile::kOutputs);
}

// use(tile) with the tile that ends first. A 64 x 64 tile has a quarter of the work, but reads twice as much shared
// memory for it: it is taken to last a third of the time of a large one, the estimate to revise on a GPU.
template <class Use>
const char* with_tile(const LinearArgs& p, const Device& device, Use use) {
  return with_format(p, device, [&](auto format) {
    using Format = decltype(format);
    using Wide = Tile<Format, 128, 128, false>;
    using Narrow = Tile<Format, 64, 64, false>;
    if (num_groups(p) > 1) return use(Tile<Format, 64, 128, true>());
    const auto rounds = [&](int64_t blocks) { return (blocks + device.num_sms - 1) / device.num_sms; };
    return rounds(num_blocks<Narrow>(p)) < 3 * rounds(num_blocks<Wide>(p)) ? use(Narrow()) : use(Wide());
  });
}

}  // namespace large

LinearPlan plan_large(const LinearArgs& p, const Device& device) {
  LinearPlan plan = {};
  large::with_tile(p, device, [&](auto tile) -> const char* {
    using Tile = decltype(tile);
    plan = {Path::kLarge, Tile::kTokens, Tile::kOutputs, large::shared_bytes<Tile>()};
    return nullptr;
  });
  return plan;
}

const char* run_large(const LinearArgs& p, const Launch& launch) {
  return large::with_tile(p, launch.device, [&](auto tile) {
    using Tile = decltype(tile);
    const gpu::Dim grid = {static_cast<unsigned>(large::num_blocks<Tile>(p))};
    return gpu::launch(linear_large<Tile>, grid, large::kThreads, large::shared_bytes<Tile>(), launch.stream, p);
  });
}

}  // namespace dllmc
