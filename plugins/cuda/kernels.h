// The ops as host functions. Each returns null, or a reason that stays valid until the thread's next call.
//
// check() reads sizes and attributes only, so it also serves where no pointer is known yet; run() checks again,
// pointers and the device included, and launches on the stream without waiting for it.
#pragma once

#include <initializer_list>

#include "args.h"

namespace dllmc {

const char* check(const QuantizeArgs&);
const char* check(const LinearArgs&);
const char* check(const HeadArgs&);
const char* check(const RotateArgs&);

// Bytes that run() needs at Launch::workspace, for these rows and for any fewer, on this device and on one that differs
// in fewer multiprocessors only.
size_t workspace_bytes(const QuantizeArgs&, const Device&);
size_t workspace_bytes(const LinearArgs&, const Device&);
size_t workspace_bytes(const HeadArgs&, const Device&);
size_t workspace_bytes(const RotateArgs&, const Device&);

const char* run(const QuantizeArgs&, const Launch&);
const char* run(const LinearArgs&, const Launch&);
const char* run(const HeadArgs&, const Launch&);
const char* run(const RotateArgs&, const Launch&);

// The current CUDA device; the host build answers with a device of compute capability 8.0.
const char* current_device(Device&);

// Null, or why no op runs there.
const char* check_device(const Device&);

// A tensor of an op: 16-byte aligned; one that is not required may be absent.
struct Pointer {
  const char* name;
  const void* address;
  bool required = true;
};
// Null, or the first that is missing or misaligned.
const char* check_pointers(std::initializer_list<Pointer>);

// What a reason calls a path.
const char* path_name(Path);

// Formats a reason into the thread's buffer, which the next call overwrites.
const char* reason(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace dllmc
