// DllmcHead: plugins/head.py.
//
// B batch, R head rows, K inner, V vocabulary, k of top_k. Weights stand in fragment order, as a linear's.
#include "creators.h"
#include "linear.h"

namespace dllmc::tensorrt {
namespace {

struct Head {
  using Args = HeadArgs;
  static constexpr const char* kName = "DllmcHead";
  static constexpr std::array kFields = {
      number<&Args::top_k>("top_k", 1, 64),
      number<&Args::layout>("layout", kFragmentLayout, kFragmentLayout),
  };
  static constexpr Port<Args> kInputs[] = {
      port<&Args::codes>("codes", "BRK"),         port<&Args::scale>("scale", "BR1"),
      port<&Args::weight>("weight", "VK"),        port<&Args::w_scale>("w_scale", "V1"),
      port<&Args::logit_bias>("logit_bias", "V"), port<&Args::inv_temp>("inv_temp", "B"),
  };
  static constexpr Port<Args> kOutputs[] = {
      port<&Args::top_ids>("top_ids", "BRk"), port<&Args::top_logits>("top_logits", "BRk"),
      port<&Args::tail>("tail", "BR"),        port<&Args::neg_entropy>("neg_entropy", "BR"),
      port<&Args::lse_t>("lse_t", "BR"),
  };

  static std::array<Axis, 1> axes(const Args& args) { return {Axis{'k', '1', args.top_k, 1}}; }
  static void sizes(Args& args, const Sizes& sizes) {
    args.rows = static_cast<int64_t>(sizes['B']) * sizes['R'];
    args.rows_per_batch = sizes['R'];
    args.inner = sizes['K'];
    args.vocabulary = sizes['V'];
  }
  template <class Has>
  static const char* contradiction(const Args&, Has) {
    return nullptr;
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* head_creator() { return creator<Head>(); }

}  // namespace dllmc::tensorrt
