// The LM head on the host: what is refused, how the work is cut, which kernels run.
#include "head.h"

#include "kernels.h"
#include "small_tile.h"

namespace dllmc {
namespace {

constexpr int64_t kMaxRows = 1 << 20;
constexpr int kMaxInner = 1 << 17;  // int32 sums of products of 8-bit codes
constexpr int kMaxVocabulary = 1 << 24;
constexpr int kBlocksPerSm = 2, kMaxChunkRows = 64;

// Rows that a block takes at once: the smallest tile that holds them all, else chunks of 64.
HeadPlan make_plan(const HeadArgs& p, const Device& device) {
  HeadPlan plan = {};
  plan.chunk_rows = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : kMaxChunkRows;
  plan.chunks = static_cast<int32_t>((p.rows + plan.chunk_rows - 1) / plan.chunk_rows);
  plan.unit_tiles = plan.chunk_rows <= 32 ? 2 : 1;
  plan.units = (p.vocabulary / kTileOutputs + plan.unit_tiles - 1) / plan.unit_tiles;
  const int blocks = kBlocksPerSm * device.num_sms / plan.chunks;
  plan.slabs = blocks < 1 ? 1 : blocks < plan.units ? blocks : plan.units;
  return plan;
}

const char* check_tensors(const HeadArgs& p) {
  return check_pointers({{"codes", p.codes},
                         {"scale", p.scale},
                         {"weight", p.weight},
                         {"w_scale", p.w_scale},
                         {"logit_bias", p.logit_bias},
                         {"inv_temp", p.inv_temp},
                         {"top_ids", p.top_ids},
                         {"top_logits", p.top_logits},
                         {"tail", p.tail},
                         {"neg_entropy", p.neg_entropy},
                         {"lse_t", p.lse_t}});
}

const char* check_path(const HeadArgs& p, const Launch& launch) {
  if (launch.path != Path::kAuto && launch.path != Path::kNaive && launch.path != Path::kSmall) {
    return reason("path: got %s, expected auto, naive or small", path_name(launch.path));
  }
  if (launch.path == Path::kSmall && p.layout != 1) {
    return reason("layout: got %d, expected 1 on the small path", p.layout);
  }
  return nullptr;
}

}  // namespace

const char* check(const HeadArgs& p) {
  if (p.rows < 0 || p.rows > kMaxRows) {
    return reason("rows: got %lld, expected 0..%lld", static_cast<long long>(p.rows), static_cast<long long>(kMaxRows));
  }
  if (p.rows && (p.rows_per_batch <= 0 || p.rows % p.rows_per_batch)) {
    return reason("rows_per_batch: got %d, expected a divisor of %lld rows", p.rows_per_batch,
                  static_cast<long long>(p.rows));
  }
  if (p.inner <= 0 || p.inner > kMaxInner || p.inner % kTileBytes) {
    return reason("inner: got %d, expected a multiple of %d in %d..%d", p.inner, kTileBytes, kTileBytes, kMaxInner);
  }
  if (p.vocabulary <= 0 || p.vocabulary > kMaxVocabulary || p.vocabulary % kTileOutputs) {
    return reason("vocabulary: got %d, expected a multiple of %d in %d..%d", p.vocabulary, kTileOutputs, kTileOutputs,
                  kMaxVocabulary);
  }
  const int most = p.vocabulary < kMaxTopK ? p.vocabulary : kMaxTopK;
  if (p.top_k < 1 || p.top_k > most) return reason("top_k: got %d, expected 1..%d", p.top_k, most);
  if (p.layout != 0 && p.layout != 1) return reason("layout: got %d, expected 0 or 1", p.layout);
  return nullptr;
}

size_t workspace_bytes(const HeadArgs& p, const Device& device) {
  if (p.layout != 1 || p.rows == 0) return 0;
  // rows * slabs is not monotone in the rows: those that fill their chunks have more. This bounds it for all numbers of
  // rows up to p.rows: chunks of at most kMaxChunkRows share the blocks, a slab holds a unit at least, or there is one.
  const int64_t chunk = p.rows < kMaxChunkRows ? p.rows : kMaxChunkRows;
  const int64_t by_blocks = chunk * kBlocksPerSm * device.num_sms, by_units = p.rows * make_plan(p, device).units;
  const int64_t shared = by_blocks < by_units ? by_blocks : by_units;
  const size_t findings = static_cast<size_t>(shared > p.rows ? shared : p.rows);
  return findings * (sizeof(RowRecord) + static_cast<size_t>(p.top_k) * sizeof(Candidate));
}

const char* run(const HeadArgs& p, const Launch& launch) {
  if (const char* why = check(p)) return why;
  if (const char* why = check_device(launch.device)) return why;
  if (const char* why = check_path(p, launch)) return why;
  if (p.rows == 0) return nullptr;
  if (const char* why = check_tensors(p)) return why;
  if (launch.path == Path::kNaive || p.layout != 1) return run_head_naive(p, launch);
  if (!launch.workspace) return reason("workspace: got no pointer, expected one");
  HeadTask task = {p, make_plan(p, launch.device), static_cast<RowRecord*>(launch.workspace), nullptr};
  task.candidates = reinterpret_cast<Candidate*>(task.records + p.rows * task.plan.slabs);
  if (const char* why = run_head_tiles(task, launch)) return why;
  return run_head_merge(task, launch);
}

}  // namespace dllmc
