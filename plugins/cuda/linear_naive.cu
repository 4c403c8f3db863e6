// The linear as a textbook writes it, and the measure of every other path: a thread makes two neighbouring outputs of a
// token (a gate and its up), one product of codes after the other. Weights in layout 0 or 1.
#include "epilogue.h"
#include "linear.h"

namespace dllmc {
namespace {

constexpr int kThreads = 128;

// Code k of a row that starts at `row`: two to a byte, the even one in the low nibble, or one to a byte.
DLLMC_DEVICE int code(const int8_t* row, int k, int bits) {
  if (bits > 4) return row[k];
  const int byte = row[k / 2];
  return k % 2 ? byte >> 4 : static_cast<int8_t>(static_cast<unsigned>(byte) << 4) >> 4;
}

DLLMC_DEVICE int weight_code(const LinearArgs& p, int n, int k) {
  if (p.w_bits > 4) return p.weight[weight_byte(p.layout, p.inner, n, k)];
  return code(p.weight + weight_byte(p.layout, p.inner / 2, n, k / 2), k % 2, p.w_bits);
}

// The linear's value of token m and output n, before SwiGLU and residual.
DLLMC_DEVICE float value(const LinearArgs& p, int64_t m, int n) {
  const int8_t* row = p.codes + m * (p.a_bits > 4 ? p.inner : p.inner / 2);
  const int groups = num_groups(p), size = group_size(p);
  float sum = 0.0f;
  for (int g = 0; g < groups; ++g) {
    int32_t acc = 0;
    for (int k = g * size; k < (g + 1) * size; ++k) acc += code(row, k, p.a_bits) * weight_code(p, n, k);
    const float term = group_term(p, acc, m, n, g, groups);
    sum = g == 0 ? term : gpu::add(sum, term);
  }
  return finish_sum(p, sum, m, n);
}

DLLMC_KERNEL(kThreads, 1)
void linear_naive(DLLMC_PARAM LinearArgs p) {
  const int64_t pair = static_cast<int64_t>(gpu::block_x()) * kThreads + gpu::thread();
  const int64_t m = pair / (p.outputs / 2);
  const int n = static_cast<int>(pair % (p.outputs / 2)) * 2;
  if (m < p.rows) store_pair(p, value(p, m, n), value(p, m, n + 1), m, n);
}

}  // namespace

const char* run_naive(const LinearArgs& p, const Launch& launch) {
  const int64_t pairs = p.rows * (p.outputs / 2);
  const unsigned blocks = static_cast<unsigned>((pairs + kThreads - 1) / kThreads);
  return gpu::launch(linear_naive, gpu::Dim{blocks}, kThreads, 0, launch.stream, p);
}

}  // namespace dllmc
