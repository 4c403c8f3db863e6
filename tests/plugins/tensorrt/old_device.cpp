// A machine whose GPU is too old, in the place of plugins/cuda/reason.cu.
#include <cstdarg>
#include <cstdio>

#include "kernels.h"

namespace dllmc {

const char* reason(const char* format, ...) {
  static thread_local char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

const char* current_device(Device& device) {
  device = {75, 40, 64 * 1024};
  return nullptr;
}

}  // namespace dllmc
