// Reasons, and what every op refuses in the same words.
#include <cstdarg>
#include <cstdio>

#include "kernels.h"

namespace dllmc {
namespace {

constexpr int kOldestArch = 80, kAlignment = 16;

}  // namespace

const char* reason(const char* format, ...) {
  static thread_local char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

const char* path_name(Path path) {
  constexpr const char* kNames[] = {"auto", "naive", "rows", "tile", "exact", "small", "large", "hopper"};
  const auto i = static_cast<uint32_t>(path);
  return i < sizeof(kNames) / sizeof(kNames[0]) ? kNames[i] : "an unknown one";
}

const char* check_device(const Device& device) {
  if (device.arch < kOldestArch) return reason("arch: got %d, expected %d or newer", device.arch, kOldestArch);
  if (device.num_sms < 1) return reason("num_sms: got %d, expected at least 1", device.num_sms);
  return nullptr;
}

const char* check_pointers(std::initializer_list<Pointer> pointers) {
  for (const Pointer& p : pointers) {
    if (!p.address && p.required) return reason("%s: got no pointer, expected one", p.name);
    const int off = static_cast<int>(reinterpret_cast<uintptr_t>(p.address) % kAlignment);
    if (off) return reason("%s: got an address %d bytes off, expected a multiple of %d", p.name, off, kAlignment);
  }
  return nullptr;
}

}  // namespace dllmc
