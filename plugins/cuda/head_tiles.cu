// The LM head's slabs: logits of at most 64 rows over a share of the vocabulary, and what a record needs of them.
//
// Tile: small_tile.h with 8-bit codes; a block stays with its slab of consecutive ids, the grid fills every SM with two
// blocks, and the logits of a unit (32 ids x up to 32 rows) live for one flush. With more than 64 rows the blocks that
// share a slab are neighbours in the grid, so that they read its weights from L2.
// Rows: a thread owns one row (two with 64) and the same 2 of 16 ids in every tile, so its sums need nobody else until
// the slab ends; then the 8 lanes of a row merge. Sums are taken relative to a base near the highest logit the thread
// has met, in float32 over a unit and in float64 across units: no rescaling error builds up, whatever the order.
// Top k: a list in order for each row. All threads of a row are in one warp, which inserts what beats the list's end;
// in a random order that is k (1 + ln(n / k)) of a slab's n ids.
#include "epilogue.h"
#include "head.h"
#include "small_tile.h"

namespace dllmc {
namespace {

// e^z' may reach e^kHeadroom before a thread's base moves up to the logit it met: rounding z' costs kHeadroom 2^-24.
constexpr float kHeadroom = 8.0f;
// e^-1000 is 0, and 0 * -1000 is 0 where 0 * -inf is not a number.
constexpr float kNegligible = -1000.0f;

// What each thread knows of its rows, an array a field; z' = l - base.
template <int kSlots>
struct RunningRows {
  double tail[kSlots], energy[kSlots], warm_tail[kSlots];  // as in RowRecord, with z' for z
  float base[kSlots], peak[kSlots], inv_temp[kSlots];

  DLLMC_DEVICE void clear(int i, float row_inv_temp) {
    tail[i] = energy[i] = warm_tail[i] = 0.0;
    base[i] = peak[i] = -INFINITY;
    inv_temp[i] = row_inv_temp;
  }

  DLLMC_DEVICE void move_base(int i, float to) {
    if (base[i] != -INFINITY) {
      const double distance = static_cast<double>(base[i]) - to, weight = ::exp(distance);
      energy[i] = weight * (energy[i] + distance * tail[i]);
      tail[i] *= weight;
      warm_tail[i] *= ::exp(distance * inv_temp[i]);
    }
    base[i] = to;
  }

  template <int kLogits>
  DLLMC_DEVICE void add(int i, const float (&logits)[kLogits]) {
    float best = logits[0];
    DLLMC_UNROLL
    for (int j = 1; j < kLogits; ++j) best = gpu::max(best, logits[j]);
    if (best == -INFINITY) return;
    const float above = best - base[i];
    if (above > kHeadroom || above * inv_temp[i] > kHeadroom) move_base(i, best);
    float top = peak[i], unit_tail = 0.0f, unit_energy = 0.0f, unit_warm = 0.0f;
    DLLMC_UNROLL
    for (int j = 0; j < kLogits; ++j) {
      const float z = gpu::sub(gpu::min(logits[j], top), base[i]);  // the lower one joins the tail
      top = gpu::max(logits[j], top);
      const float weight = gpu::exp(z);
      unit_tail = gpu::add(unit_tail, weight);
      unit_energy = gpu::add(unit_energy, gpu::mul(weight, gpu::max(z, kNegligible)));
      unit_warm = gpu::add(unit_warm, gpu::exp(gpu::mul(z, inv_temp[i])));
    }
    peak[i] = top;
    tail[i] += unit_tail;
    energy[i] += unit_energy;
    warm_tail[i] += unit_warm;
  }

  DLLMC_DEVICE RowRecord record(int i) const {
    if (peak[i] == -INFINITY) return no_record();
    const double distance = static_cast<double>(base[i]) - peak[i], weight = ::exp(distance);
    return {weight * tail[i], weight * (energy[i] + distance * tail[i]), ::exp(distance * inv_temp[i]) * warm_tail[i],
            peak[i]};
  }
};

DLLMC_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// A warp puts `added` where it belongs in a list of `size` candidates; beyond the end it changes nothing.
DLLMC_DEVICE void insert(Candidate* list, int size, const Candidate& added) {
  const int low = gpu::lane(), high = low + 32;
  const Candidate none = {-INFINITY, kNoId};
  const Candidate a = low < size ? list[low] : none, b = high < size ? list[high] : none;
  const int place = count_bits(gpu::ballot(low < size && is_before(a, added))) +
                    count_bits(gpu::ballot(high < size && is_before(b, added)));
  gpu::sync_warp();
  if (low >= place && low + 1 < size) list[low + 1] = a;
  if (high >= place && high + 1 < size) list[high + 1] = b;
  if (low == 0 && place < size) list[place] = added;
  gpu::sync_warp();
}

// Inserts each lane's candidate into its list if it beats the list's end.
DLLMC_DEVICE void offer(Candidate* lists, int list, int size, const Candidate& own, bool present) {
  bool waiting = present && is_before(own, lists[list * size + size - 1]);
  for (uint32_t bits = gpu::ballot(waiting); bits; bits = gpu::ballot(waiting)) {
    const int from = count_bits((bits & (0u - bits)) - 1);
    insert(lists + gpu::shuffle(list, from) * size, size,
           {gpu::shuffle(own.logit, from), gpu::shuffle(own.id, from)});
    waiting = waiting && gpu::lane() != from && is_before(own, lists[list * size + size - 1]);
  }
}

template <int kColumns, int kTiles>
class SlabFlush {
 public:
  using Unit = UnitPairs<kColumns, kTiles>;
  static constexpr int kSlots = Unit::kTilePairs;

  static constexpr int bytes(int top_k) {
    return Unit::kBytes + static_cast<int>(sizeof(RunningRows<kSlots>)) +
           8 * kColumns * top_k * static_cast<int>(sizeof(Candidate));
  }

  // `rows` rows from first_row on.
  DLLMC_DEVICE SlabFlush(const HeadArgs& p, int64_t first_row, int rows)
      : p_(p),
        first_row_(first_row),
        rows_(rows),
        sums_(reinterpret_cast<SumPair*>(gpu::shared())),
        running_(reinterpret_cast<RunningRows<kSlots>*>(gpu::shared() + Unit::kBytes)),
        lists_(reinterpret_cast<Candidate*>(running_ + 1)) {
    for (int i = gpu::thread(); i < kSlots; i += kSmallThreads) {
      const int64_t row = first_row + Unit::token(i);
      running_->clear(i, row < p.rows ? p.inv_temp[row / p.rows_per_batch] : 1.0f);
    }
    for (int i = gpu::thread(); i < 8 * kColumns * p.top_k; i += kSmallThreads) lists_[i] = {-INFINITY, kNoId};
  }

  DLLMC_DEVICE void operator()(const int32_t (&acc)[kTiles][kColumns][4], int unit, int) {
    gpu::sync_block();
    Unit::write(sums_, acc);
    Pair w_scale[kTiles], bias[kTiles];
    DLLMC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int id = first_id(unit, n);
      w_scale[n] = id < p_.vocabulary ? reinterpret_cast<const Pair*>(p_.w_scale)[id / 2] : Pair{0.0f, 0.0f};
      bias[n] = id < p_.vocabulary ? reinterpret_cast<const Pair*>(p_.logit_bias)[id / 2] : Pair{0.0f, 0.0f};
    }
    gpu::sync_block();
    for (int i = gpu::thread(); i < kSlots; i += kSmallThreads) {
      const int row = Unit::token(i);
      const float scale = row < rows_ ? p_.scale[first_row_ + row] : 0.0f;
      float logits[2 * kTiles];
      DLLMC_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const SumPair sum = add_warps(n * kSlots + i);
        const bool present = row < rows_ && first_id(unit, n) < p_.vocabulary;
        logits[2 * n] = present ? logit(sum.first, w_scale[n].first, scale, bias[n].first) : -INFINITY;
        logits[2 * n + 1] = present ? logit(sum.second, w_scale[n].second, scale, bias[n].second) : -INFINITY;
      }
      running_->add(i, logits);
      DLLMC_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const int id = first_id(unit, n);
        const bool present = row < rows_ && id < p_.vocabulary;
        offer(lists_, row, p_.top_k, {logits[2 * n], id}, present);
        offer(lists_, row, p_.top_k, {logits[2 * n + 1], id + 1}, present);
      }
    }
  }

  // Leaves the slab's findings; every row's threads are in one warp, which is the only one to touch its list.
  DLLMC_DEVICE void finish(const HeadTask& task, int slab) {
    for (int i = gpu::thread(); i < kSlots; i += kSmallThreads) {
      RowRecord record = running_->record(i);
      const double inv_temp = running_->inv_temp[i];
      for (int mask = 4; mask < 32; mask *= 2) {
        const RowRecord other = {gpu::shuffle_xor(record.tail, mask), gpu::shuffle_xor(record.energy, mask),
                                 gpu::shuffle_xor(record.warm_tail, mask), gpu::shuffle_xor(record.peak, mask)};
        record = merge(record, other, inv_temp);
      }
      const int row = Unit::token(i), lane = gpu::lane();
      if (row >= rows_) continue;
      const int64_t finding = (first_row_ + row) * task.plan.slabs + slab;
      if (lane < 4) task.records[finding] = record;
      for (int k = lane / 4; k < p_.top_k; k += 8) {
        task.candidates[finding * p_.top_k + k] = lists_[row * p_.top_k + k];
      }
    }
  }

 private:
  // The first of this thread's two ids in tile n of a unit.
  static DLLMC_DEVICE int first_id(int unit, int n) {
    return (unit * kTiles + n) * kTileOutputs + Unit::output(gpu::lane());
  }

  static DLLMC_DEVICE float logit(int32_t sum, float w_scale, float scale, float bias) {
    return gpu::add(gpu::mul(gpu::mul(gpu::from_int(sum), w_scale), scale), bias);
  }

  DLLMC_DEVICE SumPair add_warps(int pair) const {
    SumPair sum = {0, 0};
    DLLMC_UNROLL
    for (int w = 0; w < kSmallWarps; ++w) {
      const SumPair part = sums_[w * Unit::kPairs + pair];
      sum = {sum.first + part.first, sum.second + part.second};
    }
    return sum;
  }

  const HeadArgs& p_;
  const int64_t first_row_;
  const int rows_;
  SumPair* sums_;
  RunningRows<kSlots>* running_;
  Candidate* lists_;  // [rows, top_k]
};

template <int kColumns, int kTiles>
DLLMC_KERNEL(kSmallThreads, 2)
void head_tiles(DLLMC_PARAM HeadTask task) {
  const HeadArgs& p = task.head;
  const int slab = gpu::block_x() / task.plan.chunks, chunk = gpu::block_x() % task.plan.chunks;
  const int64_t first_row = static_cast<int64_t>(chunk) * task.plan.chunk_rows, left = p.rows - first_row;
  const int rows = left < task.plan.chunk_rows ? static_cast<int>(left) : task.plan.chunk_rows;
  const SmallProduct product = {p.codes + first_row * p.inner,  p.weight, rows, p.inner,
                                p.vocabulary / kTileOutputs, p.inner / kTileBytes, 1};
  const Share share = share_of(task.plan.units, slab, task.plan.slabs);
  SmallTile<Int8, kColumns, kTiles, false> tile(product);
  tile.start(share.begin);
  SlabFlush<kColumns, kTiles> flush(p, first_row, rows);
  tile.run(share.begin, share.end, flush);
  flush.finish(task, slab);
}

template <int kColumns, int kTiles>
const char* launch_tiles(const HeadTask& task, const Launch& launch) {
  const size_t bytes = static_cast<size_t>(SlabFlush<kColumns, kTiles>::bytes(task.head.top_k));
  const gpu::Dim grid = {static_cast<unsigned>(task.plan.slabs * task.plan.chunks)};
  return gpu::launch(head_tiles<kColumns, kTiles>, grid, kSmallThreads, bytes, launch.stream, task);
}

}  // namespace

const char* run_head_tiles(const HeadTask& task, const Launch& launch) {
  switch (task.plan.chunk_rows) {
    case 8:
      return launch_tiles<1, 2>(task, launch);
    case 16:
      return launch_tiles<2, 2>(task, launch);
    case 32:
      return launch_tiles<4, 2>(task, launch);
    default:
      return launch_tiles<8, 1>(task, launch);
  }
}

}  // namespace dllmc
