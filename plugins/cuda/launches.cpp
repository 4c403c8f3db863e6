// A CUDA runtime for machines without a GPU: the ops' own host code registers and launches its kernels through it, and
// each launch is written down instead of run. plugins/cuda_launches.py links it in cudart's place.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

#define DLLMC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;         // mangled
  int allowed = 48 * 1024;  // dynamic shared bytes, until cudaFuncSetAttribute raises them
};
// Objects register their kernels before the globals of this file are sure to be there.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
std::string written;
int most_shared_bytes = 0;

}  // namespace

// What cudaDevAttrMaxSharedMemoryPerBlockOptin says from now on.
DLLMC_EXPORT void dllmc_play(int shared_bytes) { most_shared_bytes = shared_bytes; }

// Launches since the last call, one a line: kernel, threads of a block, dynamic shared bytes of a block.
DLLMC_EXPORT const char* dllmc_launches() {
  static std::string taken;
  taken.swap(written);
  written.clear();
  return taken.c_str();
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host].name = name;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = most_shared_bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute, int value) {
  if (value > most_shared_bytes) return cudaErrorInvalidValue;
  kernels().at(host).allowed = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3, dim3 block, void**, size_t shared_bytes, cudaStream_t) {
  const Kernel& kernel = kernels().at(host);
  if (shared_bytes > static_cast<size_t>(kernel.allowed)) return cudaErrorInvalidValue;
  written += kernel.name + ' ' + std::to_string(block.x) + ' ' + std::to_string(shared_bytes) + '\n';
  return cudaSuccess;
}
// Named by stubs that nvcc writes for the launches of its own syntax, which no op uses.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

}  // extern "C"
