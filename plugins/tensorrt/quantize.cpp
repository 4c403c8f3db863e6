// DllmcQuantize: plugins/quantize.py.
//
// K inner, C bytes of codes, G groups; T blocks of g channels; a x b = K the Kronecker factors.
#include "creators.h"
#include "plugin.h"

namespace dllmc::tensorrt {
namespace {

struct Quantize {
  using Args = QuantizeArgs;
  static constexpr const char* kName = "DllmcQuantize";
  static constexpr std::array kFields = {
      flag<Args>("has_norm"),
      flag<Args>("has_scale"),
      flag<Args>("has_tac"),
      flag<Args>("has_transform"),
      flag<Args>("has_state"),
      number<&Args::bits>("bits", 2, 8),
      number<&Args::symmetric>("symmetric", 0, 1),
      number<&Args::a_group>("a_group", 0, kMaxSize),
      number<&Args::clip_lo>("clip_lo", kLeastFloat, 1),
      number<&Args::clip_hi>("clip_hi", kLeastFloat, 1),
      number<&Args::eps>("eps", 0, 1),
      number<&Args::gate_axis>("gate_axis", 0, 1),
      number<&Args::gate_size>("gate_size", 0, kMaxSize),
  };
  static constexpr Port<Args> kInputs[] = {
      floating_port<&Args::x, &Args::x_type>("x", "*K"),
      port<&Args::norm_weight>("norm_weight", "K", "has_norm"),
      port<&Args::channel_scale>("channel_scale", "K", "has_scale"),
      port<&Args::tac_matrix>("tac_matrix", "Tgg", "has_tac"),
      port<&Args::tac_bias>("tac_bias", "K", "has_tac"),
      port<&Args::left>("left", "aa", "has_transform"),
      port<&Args::right>("right", "bb", "has_transform"),
      port<&Args::state>("state", "#", "has_state"),
  };
  static constexpr Port<Args> kOutputs[] = {
      port<&Args::codes>("codes", "*C"),
      port<&Args::scale>("scale", "*G"),
      port<&Args::zero>("zero", "*G", "!symmetric"),
  };

  static std::array<Axis, 3> axes(const Args& args) {
    return {Axis{'C', 'K', 1, args.bits <= 4 ? 2 : 1}, groups('G', 'K', 1, args.a_group),
            Axis{'T', 'K', 1, args.tac_block}};
  }
  static void sizes(Args& args, const Sizes& sizes) {
    args.rows = sizes.rows;
    args.inner = sizes['K'];
    args.left_size = sizes['a'];
    args.right_size = sizes['b'];
    args.tac_block = sizes['g'];
  }
  template <class Has>
  static const char* contradiction(const Args&, Has has) {
    if (!has("has_state") || has("has_transform")) return nullptr;
    return "has_state: got 1 without a transform, expected has_transform 1 with it";
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* quantize_creator() { return creator<Quantize>(); }

}  // namespace dllmc::tensorrt
