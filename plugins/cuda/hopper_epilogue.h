// What becomes of a consumer's sums: 128 registers a thread, which must not meet a loop that is not unrolled.
//
// So a step is a loop of its own over all sums, with its condition outside, and what it needs of a token comes from
// shared memory. The order of float operations of each sum is epilogue.h's; only SwiGLU divides less exactly.
#pragma once

#include "epilogue.h"
#include "hopper.h"

namespace dllmc::hopper {

// What a group of K (all of K, without groups) needs of a token.
struct Token {
  float scale;
  int32_t zero;
};

DLLMC_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// ... and of a thread's two neighbouring outputs.
struct OutputPair {
  float w_scale[2];
  int32_t w_sum[2];

  DLLMC_DEVICE OutputPair(const LinearArgs& p, int n, int group, int num_groups) {
    DLLMC_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = smaller(n + i, p.outputs - 1);
      w_scale[i] = p.w_scale[p.w_group ? row * num_groups + group : row];
      w_sum[i] = p.zero ? p.w_sum[row * num_groups + group] : 0;
    }
  }
};

// Sums of kTokens tokens x 64 outputs as a product leaves them: sums i and i + 2 (i % 4 < 2) are outputs n and n + 1
// of token column + i / 4 * 8 + i % 2 of the tile.
template <int kTokens>
struct Epilogue {
  static constexpr int kSums = kTokens / 2, kBatch = 32;  // sums whose residuals are read at once

  const LinearArgs& p;
  const int m, n;  // the thread's first token and output
  float y[kSums];

  static DLLMC_DEVICE constexpr int token(int i) { return i / 4 * 8 + i % 2; }  // from m on
  static DLLMC_DEVICE constexpr bool is_first(int i) { return i % 4 < 2; }
  DLLMC_DEVICE bool inside(int i) const { return token(i) < static_cast<int>(p.rows) - m; }

  // Sums of a group -> its terms, the first of which start y. `tokens` are the thread's.
  template <int kShift, bool kGrouped>
  DLLMC_DEVICE void add_group(int32_t (&sums)[kSums], const OutputPair& outputs, const Token* tokens, bool first) {
    DLLMC_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] >>= kShift;
    if (p.zero) {
      DLLMC_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] += tokens[token(i)].zero * outputs.w_sum[!is_first(i)];
    }
    float term[kSums];
    DLLMC_UNROLL
    for (int i = 0; i < kSums; ++i) term[i] = gpu::mul(gpu::from_int(sums[i]), outputs.w_scale[!is_first(i)]);
    if (!kGrouped || p.a_group) scale_tokens(term, tokens);
    if (first) {
      DLLMC_UNROLL
      for (int i = 0; i < kSums; ++i) y[i] = term[i];
    } else {
      DLLMC_UNROLL
      for (int i = 0; i < kSums; ++i) y[i] = gpu::add(y[i], term[i]);
    }
  }
  static DLLMC_DEVICE void scale_tokens(float (&values)[kSums], const Token* tokens) {
    DLLMC_UNROLL
    for (int i = 0; i < kSums; ++i) values[i] = gpu::mul(values[i], tokens[token(i)].scale);
  }

  DLLMC_DEVICE void store() {
    if (p.bias) {
      const float bias[2] = {p.bias[n], p.bias[n + 1]};
      DLLMC_UNROLL
      for (int i = 0; i < kSums; ++i) y[i] = gpu::add(y[i], bias[!is_first(i)]);
    }
    if (p.swiglu) return store_swiglu();
    if (!p.residual) return store_pairs([](const void*, size_t) { return Pair{0, 0}; }, 0);
    if (p.residual_type == Type::kFloat32) {
      return store_pairs([](const void* x, size_t i) { return read_floats(x, static_cast<int64_t>(i)); }, 8);
    }
    store_pairs([](const void* x, size_t i) { return read_halves(x, static_cast<int64_t>(i)); }, 4);
  }

 private:
  // Offset of sum i's pair of outputs from the thread's first, in pairs.
  DLLMC_DEVICE size_t pair_offset(int i) const {
    return static_cast<size_t>(static_cast<uint32_t>(p.outputs) / 2) * static_cast<uint32_t>(token(i));
  }
  DLLMC_DEVICE size_t first_pair() const { return (static_cast<size_t>(m) * p.outputs + n) / 2; }

  DLLMC_DEVICE void store_swiglu() {
    DLLMC_UNROLL
    for (int i = 0; i < kSums; ++i) {
      if (!is_first(i)) continue;
      const float silu = gpu::mul(y[i], gpu::reciprocal(gpu::add(1.0f, gpu::exp(-y[i]))));
      y[i] = gpu::mul(silu, y[i + 2]);
    }
    if (p.y_type == Type::kFloat32) {
      store_each(static_cast<float*>(p.y), [](float first, float) { return first; });
    } else {
      store_each(static_cast<gpu::Half*>(p.y), [](float first, float) { return gpu::to_half(first); });
    }
  }

  // Adds read(residual, offset) of `pair_bytes` to each pair (0: there is none) and stores them.
  template <class Read>
  DLLMC_DEVICE void store_pairs(Read read, int pair_bytes) {
    const auto* residual = static_cast<const unsigned char*>(p.residual) + first_pair() * pair_bytes;
    DLLMC_UNROLL
    for (int batch = 0; batch < kSums; batch += kBatch) {
      if (pair_bytes) add_residual(batch, residual, read);
      if (p.y_type == Type::kFloat32) {
        const auto pair = [](float first, float second) { return Pair{first, second}; };
        store_each(static_cast<Pair*>(p.y), pair, batch, kBatch);
      } else {
        const auto halves = [](float first, float second) { return gpu::pack_halves(first, second); };
        store_each(static_cast<uint32_t*>(p.y), halves, batch, kBatch);
      }
    }
  }
  template <class Read>
  DLLMC_DEVICE void add_residual(int batch, const void* residual, Read read) {
    DLLMC_UNROLL
    for (int i = batch; i < batch + kBatch; ++i) {
      if (!is_first(i) || !inside(i)) continue;
      const Pair x = read(residual, pair_offset(i));
      y[i] = gpu::add(y[i], x.first);
      y[i + 2] = gpu::add(y[i + 2], x.second);
    }
  }
  template <class T, class Convert>
  DLLMC_DEVICE void store_each(T* out, Convert convert, int batch = 0, int count = kSums) {
    out += first_pair();
    gpu::settle(out);
    DLLMC_UNROLL
    for (int i = batch; i < batch + count; ++i) {
      if (is_first(i) && inside(i)) out[pair_offset(i)] = convert(y[i], y[i + 2]);
    }
  }
};

}  // namespace dllmc::hopper
