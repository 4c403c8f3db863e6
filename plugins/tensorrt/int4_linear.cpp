// DllmcInt4Linear: plugins/int4_linear.py.
#include "creators.h"
#include "linear.h"

namespace dllmc::tensorrt {
namespace {

struct Int4Linear : Linear<2, 4> {
  static constexpr const char* kName = "DllmcInt4Linear";
};

}  // namespace

nvinfer1::IPluginCreatorInterface* int4_linear_creator() { return creator<Int4Linear>(); }

}  // namespace dllmc::tensorrt
