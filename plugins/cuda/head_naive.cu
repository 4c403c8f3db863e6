// The LM head as a textbook writes it, and the measure of the fast path: a thread makes a row, every logit twice.
#include "format.h"
#include "head.h"

namespace dllmc {
namespace {

constexpr int kThreads = 32;

DLLMC_DEVICE float biased_logit(const HeadArgs& p, int64_t row, int n) {
  int32_t acc = 0;
  for (int k = 0; k < p.inner; ++k) {
    acc += p.codes[row * p.inner + k] * p.weight[weight_byte(p.layout, p.inner, n, k)];
  }
  return gpu::add(gpu::mul(gpu::mul(gpu::from_int(acc), p.w_scale[n]), p.scale[row]), p.logit_bias[n]);
}

// Keeps the row's outputs the best `count` + 1 ids so far, in order.
DLLMC_DEVICE void insert(const HeadArgs& p, int64_t row, int count, const Candidate& added) {
  float* logits = p.top_logits + row * p.top_k;
  int64_t* ids = p.top_ids + row * p.top_k;
  int i = count < p.top_k ? count : p.top_k;
  for (; i > 0 && logits[i - 1] < added.logit; --i) {
    if (i < p.top_k) {
      logits[i] = logits[i - 1];
      ids[i] = ids[i - 1];
    }
  }
  if (i < p.top_k) {
    logits[i] = added.logit;
    ids[i] = added.id;
  }
}

DLLMC_KERNEL(kThreads, 1)
void head_naive(DLLMC_PARAM HeadArgs p) {
  const int64_t row = static_cast<int64_t>(gpu::block_x()) * kThreads + gpu::thread();
  if (row >= p.rows) return;
  for (int n = 0; n < p.vocabulary; ++n) insert(p, row, n, {biased_logit(p, row, n), n});
  RowRecord record = no_record();
  record.peak = p.top_logits[row * p.top_k];
  const int64_t peak_id = p.top_ids[row * p.top_k];
  const double inv_temp = p.inv_temp[row / p.rows_per_batch];
  for (int n = 0; n < p.vocabulary; ++n) {
    const float logit = biased_logit(p, row, n);
    if (n == peak_id || logit == -INFINITY) continue;
    const double z = static_cast<double>(logit) - record.peak, weight = ::exp(z);
    record.tail += weight;
    record.energy += weight * z;
    record.warm_tail += ::exp(z * inv_temp);
  }
  store_record(p, record, row);
}

}  // namespace

const char* run_head_naive(const HeadArgs& p, const Launch& launch) {
  const unsigned blocks = static_cast<unsigned>((p.rows + kThreads - 1) / kThreads);
  return gpu::launch(head_naive, gpu::Dim{blocks}, kThreads, 0, launch.stream, p);
}

}  // namespace dllmc
