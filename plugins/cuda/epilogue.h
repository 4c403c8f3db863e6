// What turns integer sums into outputs: scales, zero point, bias, then SwiGLU or residual, in float32 and in the order
// of plugins/integer_linear.py, each operation rounded by itself. Only SwiGLU's exponential may differ in the last place.
#pragma once

#include "args.h"
#include "gpu.h"

namespace dllmc {

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

DLLMC_DEVICE float read(const void* p, Type type, int64_t i) {
  return type == Type::kFloat32 ? static_cast<const float*>(p)[i] : gpu::to_float(static_cast<const gpu::Half*>(p)[i]);
}

// Writes outputs n (even) and n + 1 of row m; with SwiGLU they are gate and up and make one output.
DLLMC_DEVICE void store_pair(const LinearArgs& p, float first, float second, int64_t m, int n) {
  if (p.swiglu) {
    const int64_t i = m * (p.outputs / 2) + n / 2;
    const float y = gpu::mul(silu(first), second);
    if (p.y_type == Type::kFloat32) {
      static_cast<float*>(p.y)[i] = y;
    } else {
      static_cast<gpu::Half*>(p.y)[i] = gpu::to_half(y);
    }
    return;
  }
  const int64_t i = m * p.outputs + n;
  if (p.residual) {
    first = gpu::add(first, read(p.residual, p.residual_type, i));
    second = gpu::add(second, read(p.residual, p.residual_type, i + 1));
  }
  if (p.y_type == Type::kFloat32) {
    static_cast<float*>(p.y)[i] = first;
    static_cast<float*>(p.y)[i + 1] = second;
  } else {
    reinterpret_cast<uint32_t*>(p.y)[i / 2] = gpu::pack_halves(first, second);
  }
}

// Rows without groups: sums of outputs n and n + 1 -> y.
DLLMC_DEVICE void store_sums(const LinearArgs& p, int32_t first, int32_t second, int64_t m, int n) {
  store_pair(p, finish_sum(p, group_term(p, first, m, n, 0, 1), m, n),
             finish_sum(p, group_term(p, second, m, n + 1, 0, 1), m, n + 1), m, n);
}

}  // namespace dllmc
