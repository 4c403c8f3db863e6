// A CUDA runtime for machines without a GPU: the ops' own host code registers and launches its kernels through it, and
// each launch is written down instead of run. plugins/cuda_launches.py links it in cudart's place.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

#define DLLMC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;  // mangled
  size_t allowed = 48 * 1024;  // dynamic shared bytes, until cudaFuncSetAttribute raises them
};
struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Objects register their kernels before the globals of this file are sure to be there.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
Configuration configured;
std::string written;
cudaError_t last = cudaSuccess;

}  // namespace

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

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  configured = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared_bytes = configured.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configured.stream;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute, int value) {
  kernels().at(host).allowed = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3, dim3 block, void**, size_t shared_bytes, cudaStream_t) {
  const Kernel& kernel = kernels().at(host);
  if (shared_bytes > kernel.allowed) return last = cudaErrorInvalidValue;
  written += kernel.name + ' ' + std::to_string(block.x) + ' ' + std::to_string(shared_bytes) + '\n';
  return cudaSuccess;
}
// What nvcc 13 calls in its place.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaGetLastError() {
  const cudaError_t status = last;
  last = cudaSuccess;
  return status;
}
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaGetDevice(int*) { return cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }

}  // extern "C"
