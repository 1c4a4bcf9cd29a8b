#include "gemm_bf16.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace r1v3 {

#if defined(__x86_64__)

namespace {

// A panel of b, 16 KiB of it, stays in the L1 cache while the panels of a pass by.
constexpr int64_t kPairs = 128;
// Panels of b that one task packs.
constexpr int64_t kTaskPanels = 4;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

bool has_gemm_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

void gemm_bf16(const BFloat16View& a, const BFloat16View& b, int64_t k, float* c, int64_t c_stride,
               bool add, int num_threads) {
  const int64_t pairs = divide_up(k, 2);
  const int64_t panels_a = divide_up(a.size, kPanelA), panels_b = divide_up(b.size, kPanelB);
  std::vector<uint32_t> packed_a(panels_a * pairs * kPanelA);
  parallel_for(panels_a, pairs * kPanelA, num_threads, [&](int64_t p) {
    pack_panel(a, p * kPanelA, kPanelA, k, packed_a.data() + p * pairs * kPanelA);
  });
  const int64_t tasks = divide_up(panels_b, kTaskPanels);
  const int64_t cost = kTaskPanels * kPanelB * std::max<int64_t>(a.size, 1) * pairs / 32;
  parallel_for(tasks, cost, num_threads, [&](int64_t task) {
    const int64_t first = task * kTaskPanels;
    const int64_t count = std::min(kTaskPanels, panels_b - first);
    std::vector<uint32_t> packed_b(count * pairs * kPanelB);
    for (int64_t p = 0; p < count; ++p) {
      pack_panel(b, (first + p) * kPanelB, kPanelB, k, packed_b.data() + p * pairs * kPanelB);
    }
    // With k = 0 one empty block still writes the zeros.
    for (int64_t begin = 0; begin == 0 || begin < pairs; begin += kPairs) {
      const int64_t n = std::min(kPairs, pairs - begin);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t column = (first + p) * kPanelB;
        const int columns = static_cast<int>(std::min<int64_t>(kPanelB, b.size - column));
        const uint32_t* panel_b = packed_b.data() + (p * pairs + begin) * kPanelB;
        for (int64_t q = 0; q < panels_a; ++q) {
          const int64_t row = q * kPanelA;
          const int rows = static_cast<int>(std::min<int64_t>(kPanelA, a.size - row));
          multiply_panels(packed_a.data() + (q * pairs + begin) * kPanelA, panel_b, n,
                          c + row * c_stride + column, c_stride, rows, columns,
                          add || begin > 0);
        }
      }
    }
  });
}

#else

bool has_gemm_bf16() { return false; }

void gemm_bf16(const BFloat16View&, const BFloat16View&, int64_t, float*, int64_t, bool, int) {}

#endif

}  // namespace r1v3
