// The two functions that TensorRT looks up in a plugin library, and the table of plugins.
#include "creators.h"

using nvinfer1::IPluginCreatorInterface;
using namespace dllmc::tensorrt;

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static IPluginCreatorInterface* const creators[] = {quantize_creator(), int4_linear_creator(), int8_linear_creator(),
                                                      head_creator(), rotate_creator()};
  count = static_cast<int32_t>(sizeof(creators) / sizeof(creators[0]));
  return creators;
}

// Required, and not used: ILogger's functions differ among releases.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
