// What turns integer sums into outputs: scales, zero point, bias, then SwiGLU or residual, in float32 and in the order
// of plugins/integer_linear.py, each operation rounded by itself. SwiGLU's exponential alone may differ, in last bits.
#pragma once

#include "args.h"
#include "gpu.h"

namespace dllmc {

struct alignas(8) Pair {  // outputs n (even) and n + 1 of a token
  float first, second;
};

// What an absent bias or residual adds: any float plus -0 is that float, bit for bit; plus 0 is not (-0).
constexpr float kNothing = -0.0f;

// What output n and token m bring to a sum without groups. Loaded once where a thread makes many outputs.
struct OutputTerms {
  float w_scale, bias;
  int32_t w_sum;
};
struct TokenTerms {
  float scale;
  int32_t zero;
};
DLLMC_DEVICE OutputTerms output_terms(const LinearArgs& p, int n) {
  return {p.w_scale[n], p.bias ? p.bias[n] : kNothing, p.zero ? p.w_sum[n] : 0};
}
DLLMC_DEVICE TokenTerms token_terms(const LinearArgs& p, int64_t m) { return {p.scale[m], p.zero ? p.zero[m] : 0}; }

// The linear's value of a sum without groups.
DLLMC_DEVICE float channel_value(int32_t acc, const OutputTerms& n, const TokenTerms& m) {
  const float term = gpu::mul(gpu::from_int(acc + m.zero * n.w_sum), n.w_scale);
  return gpu::add(gpu::mul(term, m.scale), n.bias);
}

// float(acc + zero * w_sum) * w_scale of output n and group g, without the token's scale.
DLLMC_DEVICE float group_term(const LinearArgs& p, int32_t acc, int64_t m, int n, int g, int num_groups) {
  if (p.zero) acc += p.zero[p.a_group ? m * num_groups + g : m] * p.w_sum[static_cast<int64_t>(n) * num_groups + g];
  const float w_scale = p.w_scale[p.w_group ? static_cast<int64_t>(n) * num_groups + g : n];
  const float term = gpu::mul(gpu::from_int(acc), w_scale);
  return p.a_group ? gpu::mul(term, p.scale[m * num_groups + g]) : term;
}

// The sum over groups -> the linear's value; with one group and no a_group it is group_term's result.
DLLMC_DEVICE float finish_sum(const LinearArgs& p, float sum, int64_t m, int n) {
  const float y = p.a_group ? sum : gpu::mul(sum, p.scale[m]);
  return p.bias ? gpu::add(y, p.bias[n]) : y;
}

DLLMC_DEVICE float silu(float gate) { return gpu::div(gate, gpu::add(1.0f, gpu::exp(-gate))); }

// Pair i of a tensor of float32 or of halves.
DLLMC_DEVICE Pair read_floats(const void* pairs, int64_t i) { return static_cast<const Pair*>(pairs)[i]; }
DLLMC_DEVICE Pair read_halves(const void* pairs, int64_t i) {
  const uint32_t halves = static_cast<const uint32_t*>(pairs)[i];
  return {gpu::low_half(halves), gpu::high_half(halves)};
}

// The residual of outputs n and n + 1 of row m.
DLLMC_DEVICE Pair read_residual(const LinearArgs& p, int64_t m, int n) {
  if (!p.residual) return {kNothing, kNothing};
  const int64_t i = (m * p.outputs + n) / 2;
  if (p.residual_type == Type::kFloat32) return read_floats(p.residual, i);
  return read_halves(p.residual, i);
}

// Writes outputs n and n + 1 of row m; with SwiGLU they are gate and up and make one output.
DLLMC_DEVICE void store_pair(const LinearArgs& p, Pair y, Pair residual, int64_t m, int n) {
  const int64_t i = (m * p.outputs + n) / 2;
  if (p.swiglu) {
    const float product = gpu::mul(silu(y.first), y.second);
    if (p.y_type == Type::kFloat32) {
      static_cast<float*>(p.y)[i] = product;
    } else {
      static_cast<gpu::Half*>(p.y)[i] = gpu::to_half(product);
    }
    return;
  }
  y = {gpu::add(y.first, residual.first), gpu::add(y.second, residual.second)};
  if (p.y_type == Type::kFloat32) {
    static_cast<Pair*>(p.y)[i] = y;
  } else {
    static_cast<uint32_t*>(p.y)[i] = gpu::pack_halves(y.first, y.second);
  }
}
DLLMC_DEVICE void store_pair(const LinearArgs& p, float first, float second, int64_t m, int n) {
  store_pair(p, {first, second}, read_residual(p, m, n), m, n);
}

}  // namespace dllmc
