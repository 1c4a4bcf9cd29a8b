#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace r1v3 {
namespace {

constexpr int64_t kMinimumWork = 1 << 20;  // elements per thread; 100 us or more of arithmetic

// What a loop and its helpers share. On a busy machine a new thread may wait milliseconds for its
// turn: a helper that starts when the loop is over finds it closed and goes.
class Loop {
 public:
  Loop(int64_t n, int64_t block, const std::function<void(int64_t)>& body)
      : n_(n), block_(block), body_(body) {}

  void help() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (closed_) return;
      ++helping_;
    }
    run();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--helping_ == 0) idle_.notify_one();
  }
  void finish() {
    run();
    std::unique_lock<std::mutex> lock(mutex_);
    closed_ = true;
    idle_.wait(lock, [this] { return helping_ == 0; });
  }

 private:
  void run() {
    for (;;) {
      const int64_t begin = next_.fetch_add(block_, std::memory_order_relaxed);
      if (begin >= n_) return;
      const int64_t end = std::min(n_, begin + block_);
      for (int64_t i = begin; i < end; ++i) body_(i);
    }
  }

  const int64_t n_, block_;
  const std::function<void(int64_t)>& body_;  // the caller's, there until `finish` returns
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable idle_;
  int helping_ = 0;
  bool closed_ = false;
};

}  // namespace

void parallel_for(int64_t n, int64_t cost, int num_threads,
                  const std::function<void(int64_t)>& body) {
  const int64_t work = n * std::max<int64_t>(cost, 1);
  const int64_t threads = std::min({static_cast<int64_t>(num_threads), n, work / kMinimumWork});
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  const auto loop = std::make_shared<Loop>(n, std::max<int64_t>(1, n / (threads * 8)), body);
  try {
    for (int64_t i = 1; i < threads; ++i) std::thread([loop] { loop->help(); }).detach();
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, and this one, do all the work.
  }
  loop->finish();
}

}  // namespace r1v3
