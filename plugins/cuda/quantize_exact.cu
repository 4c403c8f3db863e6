// DllmcQuantize with TAC or a Kronecker transform in float32: 8 bits, where halves would be too coarse, and tiles that
// quantize_tile.cu does not take.
//
// Tile: a block of up to 16 warps owns one row, which stays in shared memory as float32 (76 KB for 18944). Each product
// of the transform is held in registers as a whole, 8 rows x 5 columns of 32 a thread, and then replaces its input, so
// one buffer does for both. A factor's element is loaded once for 8 products, from L1 or L2: the rows of `left` and the
// tile's rows are one broadcast a warp, columns are neighbouring lanes. 40 products stand against 13 loads, so float32
// arithmetic is the limit, not memory: a b (a + b) / 128 clocks of an SM at best, 4096 for a row of 64 x 64, 21504 for
// one of 96 x 128. TAC: a warp takes as many whole blocks as have 32 channels, in place.
#include "kernels.h"
#include "quantize_row.h"

namespace dllmc {
namespace {

constexpr int kRows = 8, kColumns = 5;  // of a thread's share of the tile
constexpr int kMaxWarps = 16, kMaxThreads = kMaxWarps * 32;
constexpr int kThreadValues = kRows * kColumns;
constexpr int kMaxLeft = kRows * kMaxWarps, kMaxRight = 32 * kColumns, kMaxTac = 32;

using Sums = float[kRows][kColumns];

// The row's values in the order of loads by threads: load v starts at (v * threads + id) * 4.
using Values = float[kThreadValues / 4][4];

template <int kValues>
DLLMC_DEVICE void load_row(const QuantizeArgs& p, int64_t m, RowsShared& s, float* row) {
  RowPart<kValues, kThreadValues / kValues> part;
  part.load(p, m);
  const float factor = norm_factor(p, reduce_row(part.y, part.square_sum, false, s).square_sum);
  DLLMC_UNROLL
  for (int v = 0; v < kThreadValues / kValues; ++v) {
    const int k = (v * gpu::num_threads() + gpu::thread()) * kValues;
    if (k >= p.inner) continue;
    DLLMC_UNROLL
    for (int i = 0; i < kValues; ++i) row[k + i] = gpu::mul(part.y[v][i], factor);
  }
  gpu::sync_block();
}

DLLMC_DEVICE void compensate(const QuantizeArgs& p, float* row) {
  const int g = p.tac_block, taken = 32 / g * g, step = gpu::num_threads() / 32 * taken;
  for (int first = gpu::warp() * taken; first < p.inner; first += step) {
    const int k = first + gpu::lane();
    const bool mine = gpu::lane() < taken && k < p.inner;
    float sum = 0.0f;
    if (mine) {
      const float* matrix = p.tac_matrix + static_cast<int64_t>(k) * g;
      for (int j = 0; j < g; ++j) sum = gpu::fma(matrix[j], row[k - k % g + j], sum);
      sum = gpu::add(sum, p.tac_bias[k]);
    }
    gpu::sync_warp();
    if (mine) row[k] = sum;
  }
  gpu::sync_block();
}

// The thread's share of the a x b tile: rows first + 0..7, columns lane + 32 c.
DLLMC_DEVICE int first_row() { return gpu::warp() * kRows; }
DLLMC_DEVICE int column(int c) { return gpu::lane() + 32 * c; }

DLLMC_DEVICE void replace(const QuantizeArgs& p, const Sums& sums, float* row) {
  gpu::sync_block();
  DLLMC_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DLLMC_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (first_row() + i < p.left_size && column(c) < p.right_size) {
        row[(first_row() + i) * p.right_size + column(c)] = sums[i][c];
      }
    }
  }
  gpu::sync_block();
}

DLLMC_DEVICE void multiply_right(const QuantizeArgs& p, float* row) {
  const int b = p.right_size, last = p.inner - b;
  Sums sums = {};
  for (int k = 0; k < b; ++k) {
    float factors[kColumns], x[kRows];
    DLLMC_UNROLL
    for (int c = 0; c < kColumns; ++c) factors[c] = column(c) < b ? p.right[k * b + column(c)] : 0.0f;
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int start = (first_row() + i) * b;
      x[i] = row[(start < last ? start : last) + k];  // rows below the tile repeat the last one and are not kept
    }
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DLLMC_UNROLL
      for (int c = 0; c < kColumns; ++c) sums[i][c] = gpu::fma(x[i], factors[c], sums[i][c]);
    }
  }
  replace(p, sums, row);
}

DLLMC_DEVICE void multiply_left(const QuantizeArgs& p, int64_t m, float* row) {
  const int a = p.left_size, b = p.right_size;
  Sums sums = {};
  for (int k = 0; k < a; ++k) {
    float factors[kRows], x[kColumns];
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) factors[i] = first_row() + i < a ? p.left[k * a + first_row() + i] : 0.0f;
    DLLMC_UNROLL
    for (int c = 0; c < kColumns; ++c) x[c] = column(c) < b ? row[k * b + column(c)] : 0.0f;
    DLLMC_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DLLMC_UNROLL
      for (int c = 0; c < kColumns; ++c) sums[i][c] = gpu::fma(factors[i], x[c], sums[i][c]);
    }
  }
  const Span dropped = dropped_slice(p, m);
  DLLMC_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DLLMC_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (dropped.holds(p.gate_axis == 0 ? first_row() + i : column(c))) sums[i][c] = 0.0f;
    }
  }
  replace(p, sums, row);
}

DLLMC_KERNEL(kMaxThreads, 1)
void quantize_exact(DLLMC_PARAM QuantizeArgs p) {
  RowsShared& s = *reinterpret_cast<RowsShared*>(gpu::shared());
  float* row = reinterpret_cast<float*>(gpu::shared() + (rows_shared_bytes(p) + 15) / 16 * 16);
  const int64_t m = gpu::block_x();
  if (p.x_type == Type::kFloat32) {
    load_row<4>(p, m, s, row);
  } else {
    load_row<8>(p, m, s, row);
  }
  if (p.tac_block) compensate(p, row);
  if (p.left_size) {
    multiply_right(p, row);
    multiply_left(p, m, row);
  }
  Values y;
  DLLMC_UNROLL
  for (int v = 0; v < kThreadValues / 4; ++v) {
    const int k = (v * gpu::num_threads() + gpu::thread()) * 4;
    DLLMC_UNROLL
    for (int i = 0; i < 4; ++i) y[v][i] = k < p.inner ? row[k + i] : 0.0f;
  }
  if (p.a_group) leave_unit_extremes(y, p.inner, s.units());
  const Partial all = reduce_row(y, 0.0f, !p.a_group, s);
  write_row(p, m, y, all.extremes, 1.0f, s);
}

size_t exact_shared_bytes(const QuantizeArgs& p) {
  return (rows_shared_bytes(p) + 15) / 16 * 16 + static_cast<size_t>(p.inner) * sizeof(float);
}

}  // namespace

bool exact_can(const QuantizeArgs& p, const Device& device) {
  return p.left_size <= kMaxLeft && p.right_size <= kMaxRight && p.tac_block <= kMaxTac &&
         p.inner <= kThreadValues * kMaxThreads && exact_shared_bytes(p) <= static_cast<size_t>(device.shared_bytes);
}

const char* run_quantize_exact(const QuantizeArgs& p, const Launch& launch) {
  const int by_values = (p.inner / 32 + kThreadValues - 1) / kThreadValues, by_rows = (p.left_size + kRows - 1) / kRows;
  const int warps = by_values > by_rows ? by_values : by_rows;
  const gpu::Dim grid = {static_cast<unsigned>(p.rows)};
  return gpu::launch(quantize_exact, grid, warps * 32, exact_shared_bytes(p), launch.stream, p);
}

}  // namespace dllmc
