// The ops with C linkage, for Python's ctypes: the same argument structures, the same reasons.
#include "kernels.h"
#include "linear.h"
#ifdef DLLMC_HOST
#include "gpu.h"
#endif

namespace {

// The host build plays any GPU: what that one lacks, shared memory or an instruction, fails there, too.
void play([[maybe_unused]] const dllmc::Device& device) {
#ifdef DLLMC_HOST
  gpu::host::Block::of_this_thread().max_shared_bytes = static_cast<size_t>(device.shared_bytes);
  gpu::host::Block::of_this_thread().arch = device.arch;
#endif
}

}  // namespace

#define DLLMC_EXPORT extern "C" __attribute__((visibility("default")))

DLLMC_EXPORT const char* dllmc_device(dllmc::Device* device) { return dllmc::current_device(*device); }

#define DLLMC_OP(name, Args)                                                                              \
  DLLMC_EXPORT const char* dllmc_##name##_check(const dllmc::Args* args) { return dllmc::check(*args); }  \
  DLLMC_EXPORT size_t dllmc_##name##_workspace(const dllmc::Args* args, const dllmc::Device* device) {    \
    return dllmc::workspace_bytes(*args, *device);                                                        \
  }                                                                                                       \
  DLLMC_EXPORT const char* dllmc_##name(const dllmc::Args* args, const dllmc::Launch* launch) {           \
    play(launch->device);                                                                                 \
    return dllmc::run(*args, *launch);                                                                    \
  }                                                                                                       \
  DLLMC_EXPORT size_t dllmc_##name##_size() { return sizeof(dllmc::Args); }

DLLMC_OP(quantize, QuantizeArgs)
DLLMC_OP(linear, LinearArgs)
DLLMC_OP(head, HeadArgs)
DLLMC_OP(rotate, RotateArgs)

DLLMC_EXPORT const char* dllmc_linear_plan(const dllmc::LinearArgs* args, const dllmc::Launch* launch,
                                           dllmc::LinearPlan* plan) {
  return dllmc::plan_linear(*args, launch->device, launch->path, *plan);
}
