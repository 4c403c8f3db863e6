// DllmcInt8Linear: plugins/int8_linear.py.
#include "creators.h"
#include "linear.h"

namespace dllmc::tensorrt {
namespace {

struct Int8Linear : Linear<5, 8> {
  static constexpr const char* kName = "DllmcInt8Linear";
};

}  // namespace

nvinfer1::IPluginCreatorInterface* int8_linear_creator() { return creator<Int8Linear>(); }

}  // namespace dllmc::tensorrt
