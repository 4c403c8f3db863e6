// The LM head: what its files share. Formulas: plugins/record.py.
//
// A row's vocabulary is cut into slabs. What a slab leaves behind is a RowRecord and its top_k logits in order; records
// merge in float64. The peak never enters a sum: its weight is the 1 of 1 + tail, kept apart so that a tail far below
// float32's resolution of 1 survives.
#pragma once

#include <cmath>

#include "args.h"
#include "gpu.h"

namespace dllmc {

constexpr int kMaxTopK = 64;
constexpr int kNoId = INT32_MAX;  // in a list that is not full, with a logit of -inf

// Of a set of logits l with the highest one, `peak`; z = l - peak. Without an id that is allowed the peak is -inf.
struct RowRecord {
  double tail;       // sum of e^z over all but the peak
  double energy;     // sum of e^z z
  double warm_tail;  // sum of e^(z inv_temp) over all but the peak
  float peak;
};

struct Candidate {
  float logit;
  int32_t id;
};

// The order of top_ids: the lower id wins a tie.
DLLMC_DEVICE bool is_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

DLLMC_DEVICE RowRecord no_record() { return {0.0, 0.0, 0.0, -INFINITY}; }

// The record of both sets.
DLLMC_DEVICE RowRecord merge(RowRecord a, RowRecord b, double inv_temp) {
  if (a.peak < b.peak) {
    const RowRecord lower = a;
    a = b;
    b = lower;
  }
  if (b.peak == -INFINITY) return a;
  const double distance = static_cast<double>(b.peak) - a.peak;
  const double weight = ::exp(distance);
  a.tail += weight * (b.tail + 1);
  a.energy += weight * (b.energy + distance * (b.tail + 1));
  a.warm_tail += ::exp(distance * inv_temp) * (b.warm_tail + 1);
  return a;
}

DLLMC_DEVICE void store_record(const HeadArgs& p, const RowRecord& r, int64_t row) {
  const double inv_temp = p.inv_temp[row / p.rows_per_batch];
  p.tail[row] = static_cast<float>(r.tail);
  p.neg_entropy[row] = static_cast<float>(r.energy / (1 + r.tail) - ::log(1 + r.tail));
  p.lse_t[row] = static_cast<float>(r.peak * inv_temp + ::log(1 + r.warm_tail));
}

// How the fast path cuts its work, and the slabs' findings: records [rows, slabs], candidates [rows, slabs, top_k].
struct HeadPlan {
  int32_t chunk_rows, chunks;  // tokens a block takes at once
  int32_t unit_tiles, units;   // tiles of 16 ids between two flushes, and how many such units there are
  int32_t slabs;
};

struct HeadTask {
  HeadArgs head;
  HeadPlan plan;
  RowRecord* records;
  Candidate* candidates;
};

const char* run_head_naive(const HeadArgs&, const Launch&);
const char* run_head_tiles(const HeadTask&, const Launch&);
const char* run_head_merge(const HeadTask&, const Launch&);

}  // namespace dllmc
