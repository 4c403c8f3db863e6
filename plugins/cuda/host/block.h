// One block of a kernel on the CPU: its threads take turns, each until it has to wait.
//
// Blocks of odd number run their threads from last to first, so that a missing barrier shows in one of two blocks;
// with DLLMC_HOST_REVERSE in the environment those of even number do.
// What a GPU would answer with a hang or with garbage ends the process here, with a line that names the place: lanes
// of a warp that meet in different operations, a barrier that some threads never reach, a thread that waits for ever.
#pragma once

#include <cstdarg>
#include <cstring>
#include <memory>
#include <vector>

#include "fiber.h"

namespace gpu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace gpu

namespace gpu::host {

// A place in a kernel's source. As the last parameter with the default here(), it is the place of the call.
struct Position {
  const char* file;
  int line;

  static constexpr Position here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator!=(const Position& other) const { return line != other.line || std::strcmp(file, other.file) != 0; }
};

constexpr int kWarp = 32, kMaxThreads = 1024, kBarriers = 16;

// 16 bytes under way to shared memory; `global` is null where zeros go.
struct Copy {
  void* shared;
  const void* global;
  int group;
};

class Block;

struct Thread {
  enum class State { kReady, kWaiting, kWaitingUntil, kDone };

  Block* block = nullptr;
  int index = 0;
  State state = State::kDone;
  const void* waits_for = nullptr;  // a barrier or a meeting
  bool (*predicate)(const void*) = nullptr;
  const void* predicate_state = nullptr;
  const char* operation = "";  // with `at`, what it waits in
  Position at = {"", 0};
  std::vector<Copy> copies;
  int copy_group = 0;  // groups committed so far
  std::unique_ptr<Fiber> fiber;
};

inline thread_local Thread* running = nullptr;

// Where `count` threads wait for one another in the same operation.
struct Meeting {
  const char* operation = "";
  Position at = {"", 0};
  int arrived = 0;
  void* operands[128] = {};
};

struct Barrier {
  int count = 0, arrived = 0;
  int lanes[kMaxThreads / kWarp] = {};
  Position at[kMaxThreads / kWarp] = {};
};

class Block {
 public:
  Dim grid, index;
  int num_threads = 0;
  size_t max_shared_bytes = 227 * 1024;  // what the GPU lets a block opt in to
  int arch = 80;                         // its compute capability

  static Block& of_this_thread() {
    static thread_local const auto block = std::make_unique<Block>();  // too large for a loaded library's own TLS
    return *block;
  }

  // Runs every block of a grid, one after the other.
  void run(Dim size, int threads, size_t shared_bytes, void (*body)(const void*), const void* state) {
    grid = size;
    num_threads = threads;
    body_ = body;
    state_ = state;
    first_reverse_ = std::getenv("DLLMC_HOST_REVERSE") ? 1 : 0;
    allocate(shared_bytes);
    for (index.z = 0; index.z < grid.z; ++index.z) {
      for (index.y = 0; index.y < grid.y; ++index.y) {
        for (index.x = 0; index.x < grid.x; ++index.x) run_one();
      }
    }
  }

  unsigned char* shared() const { return shared_; }
  bool is_shared(const void* p, size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(p);
    return begin >= shared_ && begin + bytes <= shared_ + shared_bytes_;
  }

  // The `count` threads (a warp, a warpgroup) around the caller meet; the last one calls complete(operands by lane).
  template <class Operand, class Complete>
  void meet(int count, const char* operation, Position at, Operand& operand, Complete complete) {
    Thread& self = *running;
    Meeting& meeting = count == kWarp ? warps_[self.index / kWarp] : groups_[self.index / count];
    if (meeting.arrived == 0) {
      meeting.operation = operation;
      meeting.at = at;
    } else if (meeting.at != at || std::strcmp(meeting.operation, operation) != 0) {
      fail("%s at %s:%d, but other lanes are in %s at %s:%d", operation, at.file, at.line, meeting.operation,
           meeting.at.file, meeting.at.line);
    }
    meeting.operands[self.index % count] = &operand;
    if (++meeting.arrived < count) {
      wait(&meeting, operation, at);
      return;
    }
    meeting.arrived = 0;
    complete(reinterpret_cast<Operand* const*>(meeting.operands));
    wake(&meeting, self.index / count * count, count);
  }

  void barrier(int id, int count, Position at) {
    if (id < 0 || id >= kBarriers || count <= 0 || count % kWarp || count > num_threads) {
      fail("barrier %d of %d threads at %s:%d; expected id 0..15 and whole warps of the block's %d threads", id, count,
           at.file, at.line, num_threads);
    }
    Barrier& barrier = barriers_[id];
    const int warp = running->index / kWarp;
    if (barrier.arrived == 0) barrier.count = count;
    if (barrier.count != count)
      fail("barrier %d of %d and of %d threads at %s:%d", id, barrier.count, count, at.file, at.line);
    if (barrier.lanes[warp] == 0) barrier.at[warp] = at;
    if (barrier.at[warp] != at) {
      fail("barrier %d at %s:%d, but other lanes are at its line %d", id, at.file, at.line, barrier.at[warp].line);
    }
    ++barrier.lanes[warp];
    if (++barrier.arrived < count) {
      wait(&barrier, "barrier", at);
      return;
    }
    for (const int lanes : barrier.lanes) {
      if (lanes % kWarp) fail("barrier %d at %s:%d counted part of a warp", id, at.file, at.line);
    }
    barrier = {};
    wake(&barrier, 0, num_threads);
  }

  // Other threads run until predicate(state) holds.
  void wait_until(bool (*predicate)(const void*), const void* state, const char* operation, Position at) {
    Thread& self = *running;
    self.predicate = predicate;
    self.predicate_state = state;
    self.state = Thread::State::kWaitingUntil;
    pause(operation, at);
  }

  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) const {
    std::fflush(stdout);
    std::fprintf(stderr, "emulated GPU: block (%u, %u, %u)", index.x, index.y, index.z);
    if (running) std::fprintf(stderr, " thread %d (warp %d)", running->index, running->index / kWarp);
    std::fprintf(stderr, ": ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
  }

 private:
  static constexpr unsigned char kFresh = 0xFF;  // NaN, -1: what shared memory holds when a block starts
  static constexpr unsigned char kAround = 0xC3;

  // Shared memory lies between guard pages but for what its alignment to 1024 bytes leaves; that is looked at later.
  void allocate(size_t bytes) {
    const size_t aligned = (bytes + 1023) / 1024 * 1024;
    if (!memory_ || bytes != shared_bytes_) memory_ = std::make_unique<GuardedMemory>(aligned);
    shared_bytes_ = bytes;
    shared_ = memory_->end() - aligned;
  }

  void run_one() {
    std::memset(shared_, kFresh, shared_bytes_);
    std::memset(memory_->begin(), kAround, static_cast<size_t>(shared_ - memory_->begin()));
    std::memset(shared_ + shared_bytes_, kAround, static_cast<size_t>(memory_->end() - shared_) - shared_bytes_);
    reverse_ = (index.x + index.y + index.z + first_reverse_) % 2 == 1;
    num_done_ = 0;
    while (threads_.size() < static_cast<size_t>(num_threads)) {
      threads_.push_back(std::make_unique<Thread>());
      Thread& made = *threads_.back();
      made.block = this;
      made.index = static_cast<int>(threads_.size()) - 1;
      made.fiber = std::make_unique<Fiber>(&Block::live, &made);
    }
    for (int i = 0; i < num_threads; ++i) {
      threads_[i]->state = Thread::State::kReady;
      threads_[i]->copies.clear();
      threads_[i]->copy_group = 0;
    }
    running = threads_[reverse_ ? num_threads - 1 : 0].get();
    switch_context(main_, running->fiber->context());
    running = nullptr;
    for (const unsigned char* p = memory_->begin(); p < memory_->end(); ++p) {
      if (!is_shared(p, 1) && *p != kAround) fail("wrote outside the %zu bytes of shared memory", shared_bytes_);
    }
  }

  // A fiber's life: the kernel once for every block.
  static void live(void* thread) {
    Thread& self = *static_cast<Thread*>(thread);
    for (;;) {
      self.block->body_(self.block->state_);
      self.state = Thread::State::kDone;
      ++self.block->num_done_;
      self.block->pause("", {"", 0});
    }
  }

  void wait(const void* what, const char* operation, Position at) {
    running->waits_for = what;
    running->state = Thread::State::kWaiting;
    pause(operation, at);
  }

  void wake(const void* what, int first, int count) {
    for (int i = first; i < first + count; ++i) {
      Thread& thread = *threads_[i];
      if (thread.state == Thread::State::kWaiting && thread.waits_for == what) thread.state = Thread::State::kReady;
    }
  }

  void pause(const char* operation, Position at) {
    Thread& self = *running;
    self.operation = operation;
    self.at = at;
    Thread* next = pick(self.index);
    if (next == &self) return;
    running = next;
    switch_context(self.fiber->context(), next ? next->fiber->context() : main_);
  }

  // The next thread that can run; null when all are done.
  Thread* pick(int after) {
    int i = after;
    for (int tried = 0; tried < num_threads; ++tried) {
      i = reverse_ ? (i == 0 ? num_threads - 1 : i - 1) : (i + 1 == num_threads ? 0 : i + 1);
      Thread& thread = *threads_[i];
      if (thread.state == Thread::State::kWaitingUntil && thread.predicate(thread.predicate_state)) {
        thread.state = Thread::State::kReady;
      }
      if (thread.state == Thread::State::kReady) return &thread;
    }
    if (num_done_ < num_threads) report_deadlock();
    return nullptr;
  }

  [[noreturn]] void report_deadlock() const {
    running = nullptr;
    std::fprintf(stderr, "emulated GPU: %d of %d threads are done, the others wait for ever:\n", num_done_,
                 num_threads);
    const Thread* previous = nullptr;
    for (int i = 0; i < num_threads; ++i) {
      const Thread& thread = *threads_[i];
      if (thread.state == Thread::State::kDone) continue;
      const bool same = previous && thread.index == previous->index + 1 && !(thread.at != previous->at);
      if (!same)
        std::fprintf(stderr, "  thread %d on: %s at %s:%d\n", i, thread.operation, thread.at.file, thread.at.line);
      previous = &thread;
    }
    fail("threads wait for ever");
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::unique_ptr<GuardedMemory> memory_;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  Meeting warps_[kMaxThreads / kWarp], groups_[kMaxThreads / 64];
  Barrier barriers_[kBarriers];
  Context main_;
  unsigned first_reverse_ = 0;
  bool reverse_ = false;
  int num_done_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* state_ = nullptr;
};

// The calling thread stops until f() holds; other threads run meanwhile.
template <class F>
void wait_until(const F& f, const char* operation, Position at = Position::here()) {
  if (f()) return;
  running->block->wait_until([](const void* state) { return (*static_cast<const F*>(state))(); }, &f, operation, at);
}

}  // namespace gpu::host
