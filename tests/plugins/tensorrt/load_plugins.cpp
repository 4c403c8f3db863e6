// load_plugins RUNTIME LIBRARY: a TensorRT runtime loads the plugin library, finds every plugin and makes one.
#include <dlfcn.h>

#include <cstdio>
#include <initializer_list>

#include "../../../plugins/tensorrt/abi.h"

namespace {

// The registry's virtual functions of TensorRT 11 and TensorRT-RTX, up to the last one used.
class Registry {
 public:
  virtual ~Registry() = default;
  virtual void set_error_recorder(void*) noexcept = 0;
  virtual void* error_recorder() const noexcept = 0;
  virtual bool is_parent_search_enabled() const = 0;
  virtual void set_parent_search_enabled(bool) = 0;
  virtual void* load_library(const char* path) noexcept = 0;
  virtual void deregister_library(void*) noexcept = 0;
  virtual bool register_creator(nvinfer1::IPluginCreatorInterface&, const char* plugin_namespace) noexcept = 0;
  virtual nvinfer1::IPluginCreatorInterface* const* all_creators(int32_t* count) const noexcept = 0;
  virtual nvinfer1::IPluginCreatorInterface* creator(const char* name, const char* version,
                                                     const char* plugin_namespace) noexcept = 0;
};

int fail(const char* what) {
  std::printf("%s\n", what);
  return 1;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return fail("expected RUNTIME LIBRARY");
  void* runtime = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
  if (!runtime) return fail(dlerror());
  const auto get_registry = reinterpret_cast<Registry* (*)()>(dlsym(runtime, "getPluginRegistry"));
  if (!get_registry) return fail("no getPluginRegistry");
  Registry* registry = get_registry();
  if (!registry->load_library(words[2])) return fail("the library was not loaded");
  for (const char* name : {"DllmcQuantize", "DllmcInt4Linear", "DllmcInt8Linear", "DllmcHead", "DllmcRotate"}) {
    if (!registry->creator(name, "1", "dllmc")) return fail(name);
  }
  const auto make = [&](const char* name) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(registry->creator(name, "1", "dllmc"));
    const nvinfer1::PluginFieldCollection no_fields = {0, nullptr};
    return creator->createPlugin("node", &no_fields, nvinfer1::TensorRTPhase::kBUILD);
  };
  nvinfer1::IPluginV3* plugin = make("DllmcRotate");
  if (!plugin) return fail("DllmcRotate was not made");
  delete plugin;
  if (make("DllmcQuantize")) return fail("DllmcQuantize was made without its fields");
  return std::printf("loaded\n"), 0;
}
