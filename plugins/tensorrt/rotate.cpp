// DllmcRotate: plugins/rotate.py.
//
// K channels in B blocks of c.
#include "creators.h"
#include "plugin.h"

namespace dllmc::tensorrt {
namespace {

struct Rotate {
  using Args = RotateArgs;
  static constexpr const char* kName = "DllmcRotate";
  static constexpr std::array<Field<Args>, 0> kFields{};
  static constexpr Port<Args> kInputs[] = {
      floating_port<&Args::x, &Args::x_type>("x", "*K"),
      port<&Args::blocks>("blocks", "Bcc"),
      port<&Args::perm>("perm", "K"),
  };
  static constexpr Port<Args> kOutputs[] = {floating_port<&Args::y, &Args::y_type>("y", "*K", nullptr, "x")};

  static std::array<Axis, 1> axes(const Args& args) { return {Axis{'B', 'K', 1, args.block}}; }
  static void sizes(Args& args, const Sizes& sizes) {
    args.rows = sizes.rows;
    args.inner = sizes['K'];
    args.block = sizes['c'];
  }
  template <class Has>
  static const char* contradiction(const Args&, Has) {
    return nullptr;
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* rotate_creator() { return creator<Rotate>(); }

}  // namespace dllmc::tensorrt
