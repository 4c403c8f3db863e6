// DllmcQuantize: what it refuses, which path runs, what the paths need.
#include "kernels.h"
#include "quantize.h"

namespace dllmc {
namespace {

constexpr int kMaxInner = 1 << 17, kMaxRows = 1 << 30;

const char* check_grid(const QuantizeArgs& p) {
  if (p.rows < 0 || p.rows > kMaxRows) {
    return reason("rows: got %lld, expected 0 to %d", static_cast<long long>(p.rows), kMaxRows);
  }
  if (p.inner <= 0 || p.inner > kMaxInner || p.inner % 64) {
    return reason("inner: got %d, expected a multiple of 64 from 64 to %d", p.inner, kMaxInner);
  }
  if (p.bits < 2 || p.bits > 8) return reason("bits: got %d, expected 2 to 8", p.bits);
  if (p.symmetric != 0 && p.symmetric != 1) return reason("symmetric: got %d, expected 0 or 1", p.symmetric);
  if (p.a_group < 0 || p.a_group % kUnit || (p.a_group && p.inner % p.a_group)) {
    return reason("a_group: got %d, expected 0 or a multiple of %d that divides %d", p.a_group, kUnit, p.inner);
  }
  if (!(p.clip_lo > 0.0f) || !(p.clip_lo <= 1.0f)) return reason("clip_lo: got %g, expected above 0 to 1", p.clip_lo);
  if (!(p.clip_hi > 0.0f) || !(p.clip_hi <= 1.0f)) return reason("clip_hi: got %g, expected above 0 to 1", p.clip_hi);
  if (!(p.eps >= 0.0f) || !(p.eps <= 1.0f)) return reason("eps: got %g, expected 0 to 1", p.eps);
  if (p.x_type != Type::kFloat32 && p.x_type != Type::kFloat16) {
    return reason("x_type: got %d, expected 0 (float32) or 1 (float16)", static_cast<int>(p.x_type));
  }
  return nullptr;
}

const char* check_transform(const QuantizeArgs& p) {
  if (p.tac_block < 0 || (p.tac_block && p.inner % p.tac_block)) {
    return reason("tac_block: got %d, expected 0 or a divisor of %d", p.tac_block, p.inner);
  }
  if (!p.left_size && !p.right_size) return nullptr;
  if (p.left_size <= 0 || p.right_size <= 0 || static_cast<int64_t>(p.left_size) * p.right_size != p.inner) {
    return reason("left_size, right_size: got %d x %d, expected a product of %d", p.left_size, p.right_size, p.inner);
  }
  if (p.gate_axis != 0 && p.gate_axis != 1) return reason("gate_axis: got %d, expected 0 or 1", p.gate_axis);
  const int length = p.gate_axis == 0 ? p.left_size : p.right_size;
  if (p.gate_size < 0 || p.gate_size > length / 2) {
    return reason("gate_size: got %d, expected 0 to %d, half of the factor", p.gate_size, length / 2);
  }
  return nullptr;
}

const char* check_tensors(const QuantizeArgs& p) {
  const bool transform = p.left_size > 0, tac = p.tac_block > 0;
  const char* why = check_pointers({{"x", p.x},
                                    {"codes", p.codes},
                                    {"scale", p.scale},
                                    {"zero", p.symmetric ? nullptr : p.zero, !p.symmetric},
                                    {"norm_weight", p.norm_weight, false},
                                    {"channel_scale", p.channel_scale, false},
                                    {"tac_matrix", tac ? p.tac_matrix : nullptr, tac},
                                    {"tac_bias", tac ? p.tac_bias : nullptr, tac},
                                    {"left", transform ? p.left : nullptr, transform},
                                    {"right", transform ? p.right : nullptr, transform},
                                    {"state", p.state, false}});
  if (!why && p.state && !transform) return reason("state: got a tensor, expected none without left and right");
  return why;
}

bool can(const QuantizeArgs& p, const Device& device, Path path) {
  switch (path) {
    case Path::kNaive:
      return true;
    case Path::kRows:
      return rows_can(p);
    case Path::kTile:
      return tile_can(p, device);
    case Path::kExact:
      return exact_can(p, device);
    default:
      return false;
  }
}

Path plan(const QuantizeArgs& p, const Device& device) {
  for (const Path path : {Path::kRows, Path::kTile, Path::kExact}) {
    if (can(p, device, path)) return path;
  }
  return Path::kNaive;
}

}  // namespace

const char* check(const QuantizeArgs& p) {
  const char* refused = check_grid(p);
  return refused ? refused : check_transform(p);
}

size_t workspace_bytes(const QuantizeArgs& p, const Device&) {
  if (check(p)) return 0;
  // The naive path can be asked for at any size, so its share is always there.
  const size_t tile = tile_workspace(p), naive = naive_workspace(p);
  return tile > naive ? tile : naive;
}

const char* run(const QuantizeArgs& p, const Launch& launch) {
  if (const char* refused = check(p)) return refused;
  if (const char* refused = check_device(launch.device)) return refused;
  if (p.rows == 0) return nullptr;
  if (const char* refused = check_tensors(p)) return refused;
  const Path path = launch.path == Path::kAuto ? plan(p, launch.device) : launch.path;
  if (!can(p, launch.device, path)) return reason("path: got %s, which cannot take these arguments", path_name(path));
  switch (path) {
    case Path::kRows:
      return run_quantize_rows(p, launch);
    case Path::kTile:
      return run_quantize_tile(p, launch);
    case Path::kExact:
      return run_quantize_exact(p, launch);
    default:
      return run_quantize_naive(p, launch);
  }
}

}  // namespace dllmc
