// The LM head's last step: a warp merges what the slabs found of its row. A few kilobytes a row; nothing to hide.
#include "head.h"

namespace dllmc {
namespace {

constexpr int kThreads = 32;

// The best head among the lists of slabs lane, lane + 32, ...
struct Best {
  Candidate candidate;
  int slab;
};

class RowLists {
 public:
  DLLMC_DEVICE RowLists(const HeadTask& task, int64_t row)
      : slabs_(task.plan.slabs),
        top_k_(task.head.top_k),
        lists_(task.candidates + row * slabs_ * top_k_),
        taken_(reinterpret_cast<int*>(gpu::shared())) {
    for (int s = gpu::lane(); s < slabs_; s += kThreads) taken_[s] = 0;
  }

  DLLMC_DEVICE Best best() const {
    Best best = {{-INFINITY, kNoId}, 0};
    for (int s = gpu::lane(); s < slabs_; s += kThreads) {
      if (taken_[s] >= top_k_) continue;
      const Candidate head = lists_[s * top_k_ + taken_[s]];
      if (is_before(head, best.candidate)) best = {head, s};
    }
    return best;
  }

  DLLMC_DEVICE void take(int slab) { ++taken_[slab]; }

 private:
  const int slabs_, top_k_;
  const Candidate* lists_;
  int* taken_;  // of each slab's list; only the lane of the slab reads it
};

DLLMC_DEVICE Candidate best_of_warp(Candidate own) {
  for (int mask = 1; mask < kThreads; mask *= 2) {
    const Candidate other = {gpu::shuffle_xor(own.logit, mask), gpu::shuffle_xor(own.id, mask)};
    if (is_before(other, own)) own = other;
  }
  return own;
}

DLLMC_DEVICE void merge_top(const HeadTask& task, int64_t row) {
  const HeadArgs& p = task.head;
  RowLists lists(task, row);
  Best own = lists.best();
  for (int k = 0; k < p.top_k; ++k) {
    const Candidate best = best_of_warp(own.candidate);
    if (gpu::lane() == 0) {
      p.top_logits[row * p.top_k + k] = best.logit;
      p.top_ids[row * p.top_k + k] = best.id;
    }
    if (own.candidate.id != best.id || best.id == kNoId) continue;  // logits that are not numbers leave lists short
    lists.take(own.slab);
    own = lists.best();
  }
}

DLLMC_DEVICE void merge_records(const HeadTask& task, int64_t row) {
  const double inv_temp = task.head.inv_temp[row / task.head.rows_per_batch];
  RowRecord record = no_record();
  for (int s = gpu::lane(); s < task.plan.slabs; s += kThreads) {
    record = merge(record, task.records[row * task.plan.slabs + s], inv_temp);
  }
  for (int mask = 1; mask < kThreads; mask *= 2) {
    const RowRecord other = {gpu::shuffle_xor(record.tail, mask), gpu::shuffle_xor(record.energy, mask),
                             gpu::shuffle_xor(record.warm_tail, mask), gpu::shuffle_xor(record.peak, mask)};
    record = merge(record, other, inv_temp);
  }
  if (gpu::lane() == 0) store_record(task.head, record, row);
}

DLLMC_KERNEL(kThreads, 1)
void head_merge(DLLMC_PARAM HeadTask task) {
  const int64_t row = gpu::block_x();
  merge_top(task, row);
  merge_records(task, row);
}

}  // namespace

const char* run_head_merge(const HeadTask& task, const Launch& launch) {
  const size_t bytes = static_cast<size_t>(task.plan.slabs) * sizeof(int);
  return gpu::launch(head_merge, gpu::Dim{static_cast<unsigned>(task.head.rows)}, kThreads, bytes, launch.stream, task);
}

}  // namespace dllmc
