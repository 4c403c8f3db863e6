// What a kernel is asked for: pointers, integers and a stream. No runtime's header is needed to read this file.
//
// Shape letters: M rows (tokens), K inner, N outputs, G groups, V vocabulary, a x b = K the Kronecker factors.
// A null pointer says that an optional input is absent. Formulas: the references in plugins/*.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dllmc {

enum class Type : int32_t { kFloat32 = 0, kFloat16 = 1 };

// Which implementation runs; kAuto lets the plan choose. Every other value forces one, for tests and for timing.
enum class Path : int32_t { kAuto, kNaive, kRows, kTile, kExact, kSmall, kLarge, kHopper };

struct Device {
  int32_t arch;          // compute capability as two digits: 80, 87, 90, 110, ...
  int32_t num_sms;
  int32_t shared_bytes;  // shared memory a block may opt in to
};

struct Launch {
  void* stream;
  void* workspace;  // at least what the op's *_workspace says, 256-byte aligned
  Device device;
  Path path;
};

struct QuantizeArgs {
  int64_t rows;   // M
  int32_t inner;  // K
  int32_t bits, symmetric, a_group;
  float clip_lo, clip_hi, eps;
  int32_t gate_axis, gate_size;
  int32_t left_size, right_size;  // a, b; 0 without a transform
  int32_t tac_block;              // g; 0 without TAC
  Type x_type;
  const void* x;               // [M, K]
  const float* norm_weight;    // [K]
  const float* channel_scale;  // [K]
  const float* tac_matrix;     // [K/g, g, g]
  const float* tac_bias;       // [K]
  const float* left;           // [a, a]
  const float* right;          // [b, b]
  const int32_t* state;        // [M], 1 is masked
  int8_t* codes;               // [M, K/2] packed for at most 4 bits, else [M, K]
  float* scale;                // [M, 1] or [M, K/a_group]
  int32_t* zero;               // like scale; asymmetric only
};

struct LinearArgs {
  int64_t rows;            // M
  int32_t inner, outputs;  // K, N
  int32_t a_bits, w_bits, a_group, w_group, swiglu, layout;
  Type y_type, residual_type;
  const int8_t* codes;    // [M, K/2] packed for at most 4 bits, else [M, K]
  const float* scale;     // [M, 1] or, with a_group, [M, G]
  const int32_t* zero;    // like scale
  const int8_t* weight;   // [N, K/2] or [N, K], bytes in the order of `layout`
  const float* w_scale;   // [N, 1] or, with w_group, [N, G]
  const int32_t* w_sum;   // [N, G], G = 1 without groups
  const float* bias;      // [N]
  const void* residual;   // [M, N]
  void* y;                // [M, N], or [M, N/2] with swiglu
};

struct HeadArgs {
  int64_t rows;           // B * R
  int32_t rows_per_batch; // R
  int32_t inner, vocabulary, top_k, layout;
  const int8_t* codes;    // [B*R, K], 8-bit
  const float* scale;     // [B*R]
  const int8_t* weight;   // [V, K]
  const float* w_scale;   // [V]
  const float* logit_bias;  // [V]
  const float* inv_temp;    // [B]
  int64_t* top_ids;         // [B*R, top_k]
  float* top_logits;        // [B*R, top_k]
  float* tail;              // [B*R]
  float* neg_entropy;       // [B*R]
  float* lse_t;             // [B*R]
};

struct RotateArgs {
  int64_t rows;           // M
  int32_t inner, block;   // K, c
  Type x_type, y_type;
  const void* x;          // [M, K]
  const float* blocks;    // [K/c, c, c]
  const int64_t* perm;    // [K]
  void* y;                // [M, K]
};

}  // namespace dllmc
