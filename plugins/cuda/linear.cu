// The integer linear on the host: what is refused, which path runs.
#include "linear.h"

#include "kernels.h"

namespace dllmc {
namespace {

// A tile position is an int, and so is the number of blocks of the smallest tile.
constexpr int64_t kMaxRows = 1 << 20;
constexpr int kMaxOutputs = 1 << 18;
constexpr int kMaxInner = 1 << 17;
constexpr int kGroupMultiple = 128;

const char* check_bits(const LinearArgs& p) {
  if (p.a_bits < 2 || p.a_bits > 8) return reason("a_bits: got %d, expected 2..8", p.a_bits);
  if (p.w_bits < 2 || p.w_bits > 8) return reason("w_bits: got %d, expected 2..8", p.w_bits);
  if (p.a_bits <= 4 && p.w_bits > 4) {
    return reason("w_bits: got %d, expected 2..4 with a_bits %d", p.w_bits, p.a_bits);
  }
  return nullptr;
}

const char* check_sizes(const LinearArgs& p) {
  if (p.rows < 0 || p.rows > kMaxRows) {
    return reason("rows: got %lld, expected 0..%lld", static_cast<long long>(p.rows), static_cast<long long>(kMaxRows));
  }
  const int tile = p.w_bits <= 4 ? Int4::kCodesPerTile : Int8::kCodesPerTile;
  const int most = p.w_bits <= 4 || p.a_group || p.w_group ? kMaxInner : kMaxInt8Sum;
  if (p.inner <= 0 || p.inner > most || p.inner % tile) {
    return reason("inner: got %d, expected a multiple of %d in %d..%d", p.inner, tile, tile, most);
  }
  if (p.outputs <= 0 || p.outputs > kMaxOutputs || p.outputs % kTileOutputs) {
    return reason("outputs: got %d, expected a multiple of %d in %d..%d", p.outputs, kTileOutputs, kTileOutputs,
                  kMaxOutputs);
  }
  return nullptr;
}

const char* check_group(const char* field, int group, int inner) {
  if (!group || (group > 0 && group <= kMaxGroup && group % kGroupMultiple == 0 && inner % group == 0)) return nullptr;
  return reason("%s: got %d, expected 0 or a multiple of %d, at most %d, that divides %d", field, group, kGroupMultiple,
                kMaxGroup, inner);
}

const char* check_type(const char* field, Type type) {
  if (type == Type::kFloat32 || type == Type::kFloat16) return nullptr;
  return reason("%s: got %d, expected 0 (float32) or 1 (float16)", field, static_cast<int>(type));
}

const char* check_attributes(const LinearArgs& p) {
  if (const char* why = check_group("a_group", p.a_group, p.inner)) return why;
  if (const char* why = check_group("w_group", p.w_group, p.inner)) return why;
  if (p.a_group && p.w_group && p.a_group != p.w_group) {
    return reason("w_group: got %d, expected 0 or %d as a_group", p.w_group, p.a_group);
  }
  if (p.swiglu != 0 && p.swiglu != 1) return reason("swiglu: got %d, expected 0 or 1", p.swiglu);
  if (p.swiglu && p.residual) return reason("residual: got one, expected none with swiglu");
  if (p.layout != 0 && p.layout != 1) return reason("layout: got %d, expected 0 or 1", p.layout);
  if (const char* why = check_type("y_type", p.y_type)) return why;
  return check_type("residual_type", p.residual_type);
}

const char* check_tensors(const LinearArgs& p) {
  return check_pointers({{"codes", p.codes},
                         {"scale", p.scale},
                         {"zero", p.zero, false},
                         {"weight", p.weight},
                         {"w_scale", p.w_scale},
                         {"w_sum", p.w_sum, p.zero != nullptr},
                         {"bias", p.bias, false},
                         {"residual", p.residual, false},
                         {"y", p.y}});
}

}  // namespace

const char* check(const LinearArgs& p) {
  if (const char* why = check_bits(p)) return why;
  if (const char* why = check_sizes(p)) return why;
  return check_attributes(p);
}

// Weights in rows have the naive path only. In fragment order up to kMaxSmallRows tokens are bound by the weights'
// bytes, more by products: of Hopper's own kind where it has them, else of a warp's.
const char* plan_linear(const LinearArgs& p, const Device& device, Path wanted, LinearPlan& plan) {
  if (const char* why = check_device(device)) return why;
  const bool fast = p.layout == 1, few = p.rows <= kMaxSmallRows, hopper = device.arch == 90;
  Path path = wanted;
  if (wanted == Path::kAuto) {
    path = !fast ? Path::kNaive : few ? Path::kSmall : hopper ? Path::kHopper : Path::kLarge;
  }
  switch (path) {
    case Path::kNaive:
      plan = {path, 0, 0, 0};
      return nullptr;
    case Path::kSmall:
    case Path::kLarge:
    case Path::kHopper:
      if (!fast) return reason("layout: got %d, expected 1 on the %s path", p.layout, path_name(path));
      break;
    default:
      return reason("path: got %s, expected auto, naive, small, large or hopper", path_name(wanted));
  }
  if (path == Path::kSmall && !few) {
    return reason("rows: got %lld, expected at most %d on the small path", static_cast<long long>(p.rows),
                  kMaxSmallRows);
  }
  if (path == Path::kHopper && !hopper) return reason("arch: got %d, expected 90 on the hopper path", device.arch);
  plan = path == Path::kLarge ? plan_large(p, device) : LinearPlan{path, 0, 0, 0};
  if (plan.shared_bytes > device.shared_bytes) {
    return reason("shared_bytes: got %d, expected at least %d", device.shared_bytes, plan.shared_bytes);
  }
  return nullptr;
}

size_t workspace_bytes(const LinearArgs&, const Device&) { return 0; }

const char* run(const LinearArgs& p, const Launch& launch) {
  LinearPlan plan = {};
  if (const char* why = check(p)) return why;
  if (const char* why = plan_linear(p, launch.device, launch.path, plan)) return why;
  if (p.rows == 0) return nullptr;
  if (const char* why = check_tensors(p)) return why;
  switch (plan.path) {
    case Path::kSmall:
      return run_small(p, launch);
    case Path::kLarge:
      return run_large(p, launch);
    case Path::kHopper:
      return run_hopper(p, launch);
    default:
      return run_naive(p, launch);
  }
}

}  // namespace dllmc
