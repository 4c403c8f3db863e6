// The device that ops run on.
#include "kernels.h"
#ifndef DLLMC_HOST
#include <cuda_runtime_api.h>
#endif

namespace dllmc {

#ifdef DLLMC_HOST
const char* current_device(Device& device) {
  device = {80, 4, 100 * 1024};
  return nullptr;
}
#else
const char* current_device(Device& device) {
  int id = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&id);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, id);
  };
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  ask(device.num_sms, cudaDevAttrMultiProcessorCount);
  ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.arch = 10 * major + minor;
  return status == cudaSuccess ? nullptr : reason("no CUDA device: %s", cudaGetErrorString(status));
}
#endif

}  // namespace dllmc
