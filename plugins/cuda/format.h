// How the bytes of weights and activations become operands of a tensor-core product, and the weight layout behind it.
//
// Weights stand in fragment order (layout 1, plugins/layout.py): tiles of 16 outputs x 64 bytes of K, 1024 bytes each,
// tile (i, k) at (i * K_bytes / 64 + k) * 1024. A tile is two steps of 512 bytes, in which lane 4 r + t owns 16 bytes:
//   register    0               1                 2                  3
//   output      2 r             2 r + 1           2 r                2 r + 1
//   bytes of K  16 t + 8 step   16 t + 8 step     16 t + 8 step + 4  16 t + 8 step + 4
// So one 16-byte load is an A operand, a thread's rows r and r + 8 are neighbouring outputs (a gate and its up), and
// the B operand of a token is the 16 bytes at 16 t of the same 64 bytes, as they stand in memory.
//
// Activations x weights   act. bytes a tile   products a step          accumulator holds
//   Int4                  64                  1 mma k64 s4             the sum
//   Int4Wide              64                  2 mma k32 s8, nibbles    256 x the sum
//   Int8Int4              128                 2 mma k32 s8, nibbles    16 x the sum (8-bit activations, 4-bit weights)
//   Int8                  64                  1 mma k32 s8             the sum
// Nibbles go to the high half of a byte (their value times 16): no sign extension is needed.
//
// The largest K that shares a sum: accumulators, and sum + zero * w_sum, which is formed after the shift and whose
// second term may be as large as the sum, stay below 2^31. At the largest codes, 7 and 127:
//   Int4        7 * 7 K = 6.4e6, with zero 1.3e7, at K 131072
//   Int4Wide    256 * 7 * 7 K = 1.64e9, with zero 1.3e7, at K 131072
//   Int8Int4    16 * 127 * 7 K = 1.86e9, with zero 2 * 127 * 7 K = 2.3e8, at K 131072
//   Int8        127 * 127 K = 1.06e9, with zero 2 * 127 * 127 K = 2.11e9, at K 65536 (the head, without zero: 131072)
#pragma once

#include "gpu.h"

namespace dllmc {

constexpr int kTileOutputs = 16;
constexpr int kTileBytes = 64;     // bytes of K in a weight tile
constexpr int kTileStride = 1024;  // bytes of a weight tile

constexpr int kMaxInt8Sum = 1 << 16;  // largest K of a sum over 8-bit weights that a zero point may join

// Where byte `k` of output n's `row_bytes` of weights stands, in rows (layout 0) or in fragment order (1).
DLLMC_DEVICE int64_t weight_byte(int layout, int row_bytes, int n, int k) {
  if (layout == 0) return static_cast<int64_t>(n) * row_bytes + k;
  const int64_t tile = static_cast<int64_t>(n / kTileOutputs) * (row_bytes / kTileBytes) + k / kTileBytes;
  const int step = k / 8 % 2, half = k / 4 % 2, t = k % kTileBytes / 16;
  return tile * kTileStride + step * 512 + n % kTileOutputs / 2 * 64 + t * 16 + half * 8 + n % 2 * 4 + k % 4;
}

DLLMC_DEVICE uint32_t low_nibbles(uint32_t x) { return (x << 4) & 0xF0F0F0F0u; }
DLLMC_DEVICE uint32_t high_nibbles(uint32_t x) { return x & 0xF0F0F0F0u; }

// A format: Weight and Activation are the operands of one step; the activation words of step s of a lane start at
// word kStepWords * s of what it loaded for the tile (kStepWords * 8 bytes in all, from byte kStepWords * 8 * t).
struct Int4 {
  static constexpr int kActivationBytes = 64, kStepWords = 2, kShift = 0;
  static constexpr int kCodesPerTile = 128;
  struct Weight { uint32_t a[4]; };
  struct Activation { uint32_t b[2]; };
  static DLLMC_DEVICE Weight weight(const gpu::Vec& x) { return {{x.v[0], x.v[1], x.v[2], x.v[3]}}; }
  static DLLMC_DEVICE Activation activation(const uint32_t* w) { return {{w[0], w[1]}}; }
  static DLLMC_DEVICE void multiply(int32_t (&d)[4], const Weight& w, const Activation& x) {
    gpu::mma_int4(d, w.a, x.b);
  }
};

struct WideWeight {
  uint32_t low[4], high[4];
};
struct WideActivation {
  uint32_t low[2], high[2];
};
DLLMC_DEVICE WideWeight widen(const gpu::Vec& x) {
  WideWeight w;
  DLLMC_UNROLL
  for (int i = 0; i < 4; ++i) {
    w.low[i] = low_nibbles(x.v[i]);
    w.high[i] = high_nibbles(x.v[i]);
  }
  return w;
}
DLLMC_DEVICE void multiply_wide(int32_t (&d)[4], const WideWeight& w, const WideActivation& x) {
  gpu::mma_int8(d, w.low, x.low);
  gpu::mma_int8(d, w.high, x.high);
}

struct Int4Wide {
  static constexpr int kActivationBytes = 64, kStepWords = 2, kShift = 8;
  static constexpr int kCodesPerTile = 128;
  using Weight = WideWeight;
  using Activation = WideActivation;
  static DLLMC_DEVICE Weight weight(const gpu::Vec& x) { return widen(x); }
  static DLLMC_DEVICE Activation activation(const uint32_t* w) {
    return {{low_nibbles(w[0]), low_nibbles(w[1])}, {high_nibbles(w[0]), high_nibbles(w[1])}};
  }
  static DLLMC_DEVICE void multiply(int32_t (&d)[4], const Weight& w, const Activation& x) { multiply_wide(d, w, x); }
};

struct Int8Int4 {
  static constexpr int kActivationBytes = 128, kStepWords = 4, kShift = 4;
  static constexpr int kCodesPerTile = 128;
  using Weight = WideWeight;
  using Activation = WideActivation;
  static DLLMC_DEVICE Weight weight(const gpu::Vec& x) { return widen(x); }
  // A weight byte holds codes 2j and 2j + 1, so even and odd activations are told apart.
  static DLLMC_DEVICE Activation activation(const uint32_t* w) {
    return {{gpu::permute_bytes(w[0], w[1], 0x6420), gpu::permute_bytes(w[2], w[3], 0x6420)},
            {gpu::permute_bytes(w[0], w[1], 0x7531), gpu::permute_bytes(w[2], w[3], 0x7531)}};
  }
  static DLLMC_DEVICE void multiply(int32_t (&d)[4], const Weight& w, const Activation& x) { multiply_wide(d, w, x); }
};

struct Int8 {
  static constexpr int kActivationBytes = 64, kStepWords = 2, kShift = 0;
  static constexpr int kCodesPerTile = 64;
  struct Weight { uint32_t a[4]; };
  struct Activation { uint32_t b[2]; };
  static DLLMC_DEVICE Weight weight(const gpu::Vec& x) { return {{x.v[0], x.v[1], x.v[2], x.v[3]}}; }
  static DLLMC_DEVICE Activation activation(const uint32_t* w) { return {{w[0], w[1]}}; }
  static DLLMC_DEVICE void multiply(int32_t (&d)[4], const Weight& w, const Activation& x) {
    gpu::mma_int8(d, w.a, x.b);
  }
};

}  // namespace dllmc
