// DllmcQuantize: the paths' seam, and the grid that all of them end in (plugins/quantize.py, plugins/affine_grid.py).
//
//   rows    no TAC, no transform: a row stays in registers from its one read to its codes
//   tile    transform, and TAC by blocks of 16, to at most 4 bits: products of halves on tensor cores
//   exact   TAC and transform in float32 on CUDA cores: 8 bits, and sizes that the tile path lacks
//   naive   the reference's formulas in float64, one thread an element; also rows too large for the others
//
// x and the tables are finite: a NaN makes no scale here, as no maximum takes it, where the reference's scale is NaN.
#pragma once

#include <cstring>

#include "args.h"
#include "gpu.h"

namespace dllmc {

constexpr int kUnit = 128;  // groups of a_group are whole units, whose extremes are found first

const char* run_quantize_rows(const QuantizeArgs&, const Launch&);
const char* run_quantize_tile(const QuantizeArgs&, const Launch&);
const char* run_quantize_exact(const QuantizeArgs&, const Launch&);
const char* run_quantize_naive(const QuantizeArgs&, const Launch&);

// Whether a path can take these sizes on this device.
bool rows_can(const QuantizeArgs&);
bool tile_can(const QuantizeArgs&, const Device&);
bool exact_can(const QuantizeArgs&, const Device&);

// Bytes of workspace of the paths that need one.
size_t tile_workspace(const QuantizeArgs&);
size_t naive_workspace(const QuantizeArgs&);

DLLMC_HOST_DEVICE int code_limit(int bits) { return (1 << (bits - 1)) - 1; }
DLLMC_HOST_DEVICE int group_size(const QuantizeArgs& p) { return p.a_group ? p.a_group : p.inner; }
DLLMC_HOST_DEVICE int num_groups(const QuantizeArgs& p) { return p.inner / group_size(p); }

struct Span {
  int begin, end;
  DLLMC_HOST_DEVICE bool holds(int i) const { return i >= begin && i < end; }
};

// Rows (gate_axis 0) or columns (1) of the turned tile that the gate of row m zeroes; empty without states.
DLLMC_DEVICE Span dropped_slice(const QuantizeArgs& p, int64_t m) {
  if (!p.state) return {0, 0};
  const int length = p.gate_axis == 0 ? p.left_size : p.right_size;
  const int end = p.state[m] == 1 ? length : length - p.gate_size;
  return {end - p.gate_size, end};
}

DLLMC_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
DLLMC_DEVICE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Smallest and largest value of a group, 0 among them.
struct Extremes {
  float low = 0.0f, high = 0.0f;
  DLLMC_DEVICE void include(float x) {
    low = gpu::min(low, x);
    high = gpu::max(high, x);
  }
  DLLMC_DEVICE void include(const Extremes& other) {
    low = gpu::min(low, other.low);
    high = gpu::max(high, other.high);
  }
};

// Over `lanes` (a power of two) neighbours of a warp, every lane gets the result.
DLLMC_DEVICE Extremes reduce(Extremes e, int lanes = 32) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const Extremes other = {gpu::shuffle_xor(e.low, mask), gpu::shuffle_xor(e.high, mask)};
    e.include(other);
  }
  return e;
}
DLLMC_DEVICE float reduce_sum(float sum) {
  for (int mask = 16; mask > 0; mask /= 2) sum = gpu::add(sum, gpu::shuffle_xor(sum, mask));
  return sum;
}

// A group's scale and zero point, and what makes codes of its values.
struct Grid {
  float scale, inverse, low, high, near;
  int zero;
};

// float32 operations as plugins/affine_grid.py orders them.
DLLMC_DEVICE Grid make_grid(const QuantizeArgs& p, const Extremes& e) {
  const float limit = gpu::from_int(code_limit(p.bits));
  Grid g;
  float zero = 0.0f;
  if (p.symmetric) {
    g.scale = gpu::div(gpu::mul(gpu::max(e.high, -e.low), p.clip_hi), limit);
    g.scale = g.scale > 0.0f ? g.scale : 1.0f;
  } else {
    const float high = gpu::mul(e.high, p.clip_hi), low = gpu::mul(e.low, p.clip_lo);
    g.scale = gpu::div(gpu::sub(high, low), gpu::mul(limit, 2.0f));
    g.scale = g.scale > 0.0f ? g.scale : 1.0f;
    zero = gpu::rint(gpu::div(gpu::add(high, low), gpu::mul(g.scale, 2.0f)));
  }
  g.zero = gpu::to_int(zero);
  g.low = zero - limit;
  g.high = zero + limit;
  g.inverse = gpu::div(1.0f, g.scale);
  // |x / s| <= 2 limit + 1 where it is not clipped; product and reciprocal are off by at most 1.5 * 2^-23 of that.
  const bool plain = g.scale > 0x1p-100f && g.scale < 0x1p100f;
  g.near = plain ? 0.5f - (limit + 1.0f) * 0x1p-21f : -1.0f;
  return g;
}

DLLMC_DEVICE void store_grid(const QuantizeArgs& p, const Grid& g, int64_t m, int group) {
  const int64_t i = m * num_groups(p) + group;
  p.scale[i] = g.scale;
  if (!p.symmetric) p.zero[i] = g.zero;
}

constexpr float kRounder = 0x1.8p23f;  // added, it leaves a float's nearest integer (half to even) in its low bits

// Code of a quotient x / s that need not be exact.
DLLMC_DEVICE int near_code(const Grid& g, float steps) {
  const float kept = gpu::min(gpu::max(steps, g.low), g.high);
  return static_cast<int>(float_bits(gpu::add(kept, kRounder)) - float_bits(kRounder)) - g.zero;
}
// Code of x as by a true division: that is only needed where the product with 1 / s lies near a half.
DLLMC_DEVICE int exact_code(const Grid& g, float x) {
  const float steps = gpu::mul(x, g.inverse);
  const float kept = gpu::min(gpu::max(steps, g.low), g.high);
  const float rounded = gpu::add(kept, kRounder);
  if (gpu::abs(gpu::sub(kept, gpu::sub(rounded, kRounder))) < g.near) {
    return static_cast<int>(float_bits(rounded) - float_bits(kRounder)) - g.zero;
  }
  return near_code(g, gpu::div(x, g.scale));
}

// Four codes as 2 bytes, element 0 in the lowest nibble, or as 4 bytes.
DLLMC_DEVICE uint32_t pack_nibbles(const int (&c)[4]) {
  return (c[0] & 15) | (c[1] & 15) << 4 | (c[2] & 15) << 8 | (c[3] & 15) << 12;
}
DLLMC_DEVICE uint32_t pack_bytes(const int (&c)[4]) {
  return (c[0] & 255) | (c[1] & 255) << 8 | (c[2] & 255) << 16 | static_cast<uint32_t>(c[3] & 255) << 24;
}

}  // namespace dllmc
