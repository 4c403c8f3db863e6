// A machine whose GPU is too old, in the place of plugins/cuda/device.cu.
#include "kernels.h"

namespace dllmc {

const char* current_device(Device& device) {
  device = {75, 40, 64 * 1024};
  return nullptr;
}

}  // namespace dllmc
