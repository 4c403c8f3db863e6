// Threads of a kernel as fibers of one operating-system thread: a switch costs two register saves and no system call.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace gpu::host {

inline size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Memory between two pages that may not be touched, so that running out of it faults at once.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : size_((bytes + page_bytes() - 1) / page_bytes() * page_bytes()) {
    void* map = mmap(nullptr, size_ + 2 * page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map != MAP_FAILED) begin_ = static_cast<unsigned char*>(map) + page_bytes();
    if (map == MAP_FAILED || (size_ > 0 && mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("memory of the emulated GPU");
      std::abort();
    }
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(begin_ - page_bytes(), size_ + 2 * page_bytes()); }

  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + size_; }  // a page border
  size_t size() const { return size_; }

 private:
  unsigned char* begin_ = nullptr;
  size_t size_;
};

struct Context {
  jmp_buf registers;
};

// Leaves `from`, which goes on here when somebody switches back to it.
__attribute__((noinline)) inline void switch_context(Context& from, Context& to) {
  if (_setjmp(from.registers) == 0) _longjmp(to.registers, 1);
}

// A stack whose context, when switched to, calls `body(argument)`; the body never returns.
class Fiber {
 public:
  using Body = void (*)(void*);

  Fiber(Body body, void* argument) : stack_(kStackBytes), body_(body), argument_(argument) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_.begin();
    start.uc_stack.ss_size = stack_.size();
    start.uc_link = nullptr;
    starting() = this;
    makecontext(&start, &Fiber::enter, 0);
    if (_setjmp(creator_.registers) == 0) setcontext(&start);
  }

  Context& context() { return context_; }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;  // untouched pages cost nothing

  static Fiber*& starting() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }
  [[noreturn]] static void enter() {
    Fiber& self = *starting();
    switch_context(self.context_, self.creator_);
    self.body_(self.argument_);
    std::abort();
  }

  GuardedMemory stack_;
  Body body_;
  void* argument_;
  Context context_, creator_;
};

}  // namespace gpu::host
