// Every thread of the grid has a stack of its own and runs until it waits for another.
#include <ucontext.h>

#include "grid.h"

namespace emulator {

Launch launch;
Thread* running = nullptr;

namespace {

constexpr size_t kStack = 1 << 16;
jmp_buf scheduler;
std::vector<std::unique_ptr<char[]>> stacks;  // of threads that have ended

void body() {
  launch.kernel();
  Thread& self = *running;
  if (!self.open.empty() || !self.committed.empty()) fail("a thread ended with copies under way");
  self.done = true;
  suspend();
}

[[noreturn]] void start(Thread& thread) {
  if (stacks.empty()) {
    thread.stack.reset(new char[kStack]);
  } else {
    thread.stack = std::move(stacks.back());
    stacks.pop_back();
  }
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
  setcontext(&context);
  std::abort();
}

}  // namespace

// Only the first entry costs system calls.
void resume(Thread& thread) {
  running = &thread;
  if (_setjmp(scheduler) == 0) {
    if (running->started) _longjmp(running->context, 1);
    running->started = true;
    start(*running);
  }
  if (running->done) stacks.push_back(std::move(running->stack));
  running = nullptr;
}

void suspend() {
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}

void let_others_run() {
  launch.ready.push_back(running);
  suspend();
}

void wake(std::vector<Thread*>& waiting) {
  launch.ready.insert(launch.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// The launch ends here: no thread of it runs again.
void fail(const std::string& what) {
  if (launch.failure.empty()) {
    launch.failure = what + " (thread " + std::to_string(running->index) + " of block " +
                     std::to_string(running->block->index) + ")";
  }
  _longjmp(scheduler, 1);
}

}  // namespace emulator
