// DllmcQuantize as its reference says it: one step after the other, one thread an element, sums in float64.
//
// For tests and for rows that no other path takes. Every step of a few rows leaves its result in the workspace:
//   prepared [M, K] float32, turned [M, K] float64, roots [M] float32, grids [M, G]
#include <cmath>

#include "kernels.h"
#include "quantize.h"

namespace dllmc {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChunk = 8;  // rows at a time, so that the workspace stays small

struct NaiveArgs {
  QuantizeArgs q;
  double* turned;
  float* prepared;
  float* roots;
  Grid* grids;
};

DLLMC_DEVICE int64_t element() { return static_cast<int64_t>(gpu::block_x()) * gpu::num_threads() + gpu::thread(); }

DLLMC_DEVICE float read_x(const QuantizeArgs& p, int64_t i) {
  if (p.x_type == Type::kFloat32) return static_cast<const float*>(p.x)[i];
  return gpu::to_float(static_cast<const gpu::Half*>(p.x)[i]);
}

DLLMC_KERNEL(kThreads, 1)
void naive_roots(DLLMC_PARAM NaiveArgs p) {
  const int64_t m = element();
  if (m >= p.q.rows) return;
  double sum = 0.0;
  for (int k = 0; k < p.q.inner; ++k) {
    const double x = read_x(p.q, m * p.q.inner + k);
    sum += x * x;
  }
  p.roots[m] = static_cast<float>(std::sqrt(sum / p.q.inner + static_cast<double>(p.q.eps)));
}

DLLMC_KERNEL(kThreads, 1)
void naive_prepare(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (i >= p.q.rows * p.q.inner) return;
  const int k = static_cast<int>(i % p.q.inner);
  float y = read_x(p.q, i);
  if (p.q.norm_weight) y = gpu::mul(gpu::div(y, p.roots[i / p.q.inner]), p.q.norm_weight[k]);
  if (p.q.channel_scale) y = gpu::mul(y, p.q.channel_scale[k]);
  p.prepared[i] = y;
}

DLLMC_KERNEL(kThreads, 1)
void naive_compensate(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (i >= p.q.rows * p.q.inner) return;
  const int k = static_cast<int>(i % p.q.inner), g = p.q.tac_block;
  const float* matrix = p.q.tac_matrix + static_cast<int64_t>(k) * g;
  double sum = 0.0;
  for (int j = 0; j < g; ++j) sum += static_cast<double>(matrix[j]) * p.prepared[i - k % g + j];
  p.turned[i] = sum;
}

DLLMC_KERNEL(kThreads, 1)
void naive_add_bias(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (i >= p.q.rows * p.q.inner) return;
  p.prepared[i] = gpu::add(static_cast<float>(p.turned[i]), p.q.tac_bias[i % p.q.inner]);
}

DLLMC_KERNEL(kThreads, 1)
void naive_right(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (i >= p.q.rows * p.q.inner) return;
  const int b = p.q.right_size, column = static_cast<int>(i % b);
  double sum = 0.0;
  for (int j = 0; j < b; ++j) {
    sum += static_cast<double>(p.prepared[i - column + j]) * p.q.right[static_cast<int64_t>(j) * b + column];
  }
  p.turned[i] = sum;
}

DLLMC_KERNEL(kThreads, 1)
void naive_left(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (i >= p.q.rows * p.q.inner) return;
  const int a = p.q.left_size, b = p.q.right_size, k = static_cast<int>(i % p.q.inner), row = k / b;
  const int64_t first = i - k + k % b;
  double sum = 0.0;
  for (int j = 0; j < a; ++j) {
    sum += static_cast<double>(p.q.left[static_cast<int64_t>(j) * a + row]) *
           p.turned[first + static_cast<int64_t>(j) * b];
  }
  const Span dropped = dropped_slice(p.q, i / p.q.inner);
  p.prepared[i] = dropped.holds(p.q.gate_axis == 0 ? row : k % b) ? 0.0f : static_cast<float>(sum);
}

DLLMC_KERNEL(kThreads, 1)
void naive_grids(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  const int groups = num_groups(p.q), size = group_size(p.q);
  if (i >= p.q.rows * groups) return;
  Extremes e;
  for (int k = 0; k < size; ++k) e.include(p.prepared[i * size + k]);
  p.grids[i] = make_grid(p.q, e);
  store_grid(p.q, p.grids[i], i / groups, static_cast<int>(i % groups));
}

DLLMC_DEVICE int naive_code(const NaiveArgs& p, int64_t i) {
  const Grid& g = p.grids[i / group_size(p.q)];
  const float limit = gpu::from_int(code_limit(p.q.bits));
  const float steps = gpu::sub(gpu::rint(gpu::div(p.prepared[i], g.scale)), gpu::from_int(g.zero));
  return gpu::to_int(gpu::min(gpu::max(steps, -limit), limit));
}

DLLMC_KERNEL(kThreads, 1)
void naive_codes(DLLMC_PARAM NaiveArgs p) {
  const int64_t i = element();
  if (p.q.bits > 4) {
    if (i < p.q.rows * p.q.inner) p.q.codes[i] = static_cast<int8_t>(naive_code(p, i));
  } else if (i < p.q.rows * p.q.inner / 2) {
    p.q.codes[i] = static_cast<int8_t>((naive_code(p, 2 * i) & 15) | naive_code(p, 2 * i + 1) << 4);
  }
}

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The rows from `first` on, at most kChunk of them.
QuantizeArgs chunk_of(QuantizeArgs p, int64_t first) {
  const int64_t bytes = p.inner * (p.x_type == Type::kFloat32 ? 4 : 2), groups = num_groups(p);
  p.rows = p.rows - first < kChunk ? p.rows - first : kChunk;
  p.x = static_cast<const unsigned char*>(p.x) + first * bytes;
  p.codes += first * (p.bits <= 4 ? p.inner / 2 : p.inner);
  p.scale += first * groups;
  if (!p.symmetric) p.zero += first * groups;
  if (p.state) p.state += first;
  return p;
}

const char* run_chunk(const QuantizeArgs& q, const Launch& launch) {
  const int64_t n = q.rows * q.inner;
  unsigned char* turned = static_cast<unsigned char*>(launch.workspace);
  unsigned char* prepared = turned + aligned(n * 8);
  unsigned char* roots = prepared + aligned(n * 4);
  unsigned char* grids = roots + aligned(q.rows * 4);
  const NaiveArgs p = {q, reinterpret_cast<double*>(turned), reinterpret_cast<float*>(prepared),
                       reinterpret_cast<float*>(roots), reinterpret_cast<Grid*>(grids)};
  const char* failure = nullptr;
  const auto start = [&](void (*kernel)(NaiveArgs), int64_t threads) {
    const gpu::Dim grid = {static_cast<unsigned>((threads + kThreads - 1) / kThreads)};
    if (!failure) failure = gpu::launch(kernel, grid, kThreads, 0, launch.stream, p);
  };
  if (q.norm_weight) start(naive_roots, q.rows);
  start(naive_prepare, n);
  if (q.tac_block) {
    start(naive_compensate, n);
    start(naive_add_bias, n);
  }
  if (q.left_size) {
    start(naive_right, n);
    start(naive_left, n);
  }
  start(naive_grids, q.rows * num_groups(q));
  start(naive_codes, q.bits <= 4 ? n / 2 : n);
  return failure;
}

}  // namespace

size_t naive_workspace(const QuantizeArgs& p) {
  const size_t rows = p.rows < kChunk ? p.rows : kChunk, n = rows * p.inner;
  return aligned(n * 8) + aligned(n * 4) + aligned(rows * 4) + rows * num_groups(p) * sizeof(Grid);
}

const char* run_quantize_naive(const QuantizeArgs& p, const Launch& launch) {
  const char* failure = nullptr;
  for (int64_t m = 0; m < p.rows && !failure; m += kChunk) failure = run_chunk(chunk_of(p, m), launch);
  return failure;
}

}  // namespace dllmc
