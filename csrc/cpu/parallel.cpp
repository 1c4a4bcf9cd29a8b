#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace r1v3 {
namespace {

constexpr int64_t kMinimumWork = 1 << 20;  // elements per thread; 100 us or more of arithmetic

}  // namespace

void parallel_for(int64_t n, int64_t cost, int num_threads,
                  const std::function<void(int64_t)>& body) {
  const int64_t work = n * std::max<int64_t>(cost, 1);
  const int64_t threads = std::min({static_cast<int64_t>(num_threads), n, work / kMinimumWork});
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  const int64_t block = std::max<int64_t>(1, n / (threads * 8));
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(block, std::memory_order_relaxed);
      if (begin >= n) return;
      const int64_t end = std::min(n, begin + block);
      for (int64_t i = begin; i < end; ++i) body(i);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, and this one, do all the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace r1v3
