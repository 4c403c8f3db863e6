// DllmcQuantize without TAC and transform: RMSNorm, channel scale, extremes, codes.
//
// Tile: a block owns one row; a thread owns 32 values of it, as 8 (float32) or 4 (float16) loads of 16 bytes that are
// all issued before the first is used: 64 to 128 bytes in flight a thread, 64 KB and more an SM. The row stays in
// registers, so memory sees it once; norm_weight and channel_scale come from L1 for all but the first row of an SM.
// One barrier: the sum of squares and the extremes of x * norm_weight * channel_scale are reduced together, and the
// norm's factor 1 / root goes into the scale. A second barrier only with groups, whose extremes meet by units of 128.
// Instructions, not bytes, are what is short on large GPUs (18 a value at an H200's bandwidth), so no value is divided:
// x * (1 / s) decides all but the neighbourhood of halves (quantize.h), and adding 1.5 * 2^23 rounds it.
#include "kernels.h"
#include "quantize_row.h"

namespace dllmc {
namespace {

constexpr int kThreadValues = 32, kMaxThreads = 896;  // K up to 28672; more threads would leave too few registers

template <int kValues>
DLLMC_KERNEL(kMaxThreads, 1)
void quantize_rows(DLLMC_PARAM QuantizeArgs p) {
  constexpr int kVecs = kThreadValues / kValues;
  RowsShared& s = *reinterpret_cast<RowsShared*>(gpu::shared());
  const int m = gpu::block_x();
  RowPart<kValues, kVecs> part;
  part.load(p, m);
  if (p.a_group) leave_unit_extremes(part.y, p.inner, s.units());
  const Partial all = reduce_row(part.y, part.square_sum, !p.a_group, s);
  write_row(p, m, part.y, all.extremes, norm_factor(p, all.square_sum), s);
}

}  // namespace

bool rows_can(const QuantizeArgs& p) { return !p.left_size && !p.tac_block && p.inner <= kThreadValues * kMaxThreads; }

const char* run_quantize_rows(const QuantizeArgs& p, const Launch& launch) {
  const int threads = (p.inner / kThreadValues + 31) / 32 * 32;
  const gpu::Dim grid = {static_cast<unsigned>(p.rows)};
  const auto kernel = p.x_type == Type::kFloat32 ? quantize_rows<4> : quantize_rows<8>;
  return gpu::launch(kernel, grid, threads, rows_shared_bytes(p), launch.stream, p);
}

}  // namespace dllmc
