// What DllmcInt4Linear and DllmcInt8Linear share: plugins/integer_linear.py.
//
// N outputs, W bytes of a weight row, A bytes of an activation row, G groups; scale has S and w_scale H of them; y has
// Y outputs. Weights stand in fragment order (layout 1), the only one that the fast kernels read.
#pragma once

#include "plugin.h"

namespace dllmc::tensorrt {

constexpr int32_t kFragmentLayout = 1;

template <int kLeastBits, int kMostBits>
struct Linear {
  using Args = LinearArgs;
  static constexpr int32_t kWeightsPerByte = kMostBits <= 4 ? 2 : 1;
  static constexpr std::array kFields = {
      flag<Args>("has_zero"),
      flag<Args>("has_bias"),
      flag<Args>("has_residual"),
      number<&Args::a_bits>("a_bits", 2, 8),
      number<&Args::w_bits>("w_bits", kLeastBits, kMostBits),
      number<&Args::a_group>("a_group", 0, kMaxSize),
      number<&Args::w_group>("w_group", 0, kMaxSize),
      number<&Args::swiglu>("swiglu", 0, 1),
      number<&Args::layout>("layout", kFragmentLayout, kFragmentLayout),
  };
  static constexpr Port<Args> kInputs[] = {
      port<&Args::codes>("codes", "*A"),
      port<&Args::scale>("scale", "*S"),
      port<&Args::zero>("zero", "*S", "has_zero"),
      port<&Args::weight>("weight", "NW"),
      port<&Args::w_scale>("w_scale", "NH"),
      port<&Args::w_sum>("w_sum", "NG", "has_zero"),
      port<&Args::bias>("bias", "N", "has_bias"),
      floating_port<&Args::residual, &Args::residual_type>("residual", "*N", "has_residual"),
  };
  static constexpr Port<Args> kOutputs[] = {floating_port<&Args::y, &Args::y_type>("y", "*Y", nullptr, "residual")};

  static std::array<Axis, 5> axes(const Args& args) {
    const int32_t group = args.a_group ? args.a_group : args.w_group;
    return {Axis{'A', 'W', kWeightsPerByte, args.a_bits <= 4 ? 2 : 1}, groups('S', 'W', kWeightsPerByte, args.a_group),
            groups('H', 'W', kWeightsPerByte, args.w_group), groups('G', 'W', kWeightsPerByte, group),
            Axis{'Y', 'N', 1, args.swiglu ? 2 : 1}};
  }
  static void sizes(Args& args, const Sizes& sizes) {
    args.rows = sizes.rows;
    args.inner = sizes['W'] * kWeightsPerByte;
    args.outputs = sizes['N'];
  }
  template <class Has>
  static const char* contradiction(const Args& args, Has has) {
    if (args.swiglu && has("has_residual")) return "swiglu: got 1 with a residual, expected has_residual 0 with it";
    if (args.a_bits <= 4 && args.w_bits > 4) {
      return reason("a_bits: got %d with w_bits %d, expected 5 to 8", args.a_bits, args.w_bits);
    }
    if (!args.a_group || !args.w_group || args.a_group == args.w_group) return nullptr;
    return reason("w_group: got %d with a_group %d, expected 0 or the same", args.w_group, args.a_group);
  }
};

}  // namespace dllmc::tensorrt
