#include "gemm.h"

#include <algorithm>
#include <memory>
#include <new>

#include "capability.h"
#include "parallel.h"
#include "rows.h"

namespace r1v3 {
namespace {

// Units of k that are summed in registers. A panel of b of so many, 32 KiB, and the panels of a that
// pass by come from the L2 cache fast enough.
constexpr int64_t kMostUnits = 256;
constexpr int64_t kUnitAlignment = 16;
constexpr std::align_val_t kAlignment{64};

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Release {
  void operator()(uint32_t* memory) const { operator delete[](memory, kAlignment); }
};
using Memory = std::unique_ptr<uint32_t[], Release>;

Memory allocate(int64_t units) { return Memory(new (kAlignment) uint32_t[units]); }

// k in blocks of nearly equal size. With k = 0 one empty block still writes the zeros.
struct Blocks {
  Blocks(int64_t k, int per_unit)
      : k(k),
        per_unit(per_unit),
        count(std::max<int64_t>(divide_up(divide_up(k, per_unit), kMostUnits), 1)),
        units(divide_up(divide_up(divide_up(k, per_unit), count), kUnitAlignment) *
              kUnitAlignment) {}

  int64_t begin(int64_t block) const { return std::min(k, block * units * per_unit); }
  int64_t size(int64_t block) const { return divide_up(begin(block + 1) - begin(block), per_unit); }

  const int64_t k, per_unit, count, units;
};

// The rows of a view in panels of equal width, but for the last.
class Panels {
 public:
  Panels(const GemmKernels& kernels, const MatrixView& view, const Blocks& blocks, bool of_b)
      : kernels_(kernels), view_(view), blocks_(blocks), of_b_(of_b) {
    const int64_t most = of_b ? kernels.columns : kernels.most_rows;
    const int64_t fewest = std::max<int64_t>(divide_up(view.size, most), 1);
    width = of_b ? most : std::max<int64_t>(divide_up(view.size, fewest), 1);
    count = divide_up(view.size, width);
    units = width * blocks.units;
  }

  int rows(int64_t panel) const {
    return static_cast<int>(std::min(width, view_.size - panel * width));
  }
  void pack(int64_t panel, int64_t block, uint32_t* out) const {
    const int64_t begin = blocks_.begin(block), end = blocks_.begin(block + 1);
    const bool last = block + 1 == blocks_.count;
    const int64_t ahead =
        last ? width * view_.stride - begin * view_.k_stride : (end - begin) * view_.k_stride;
    kernels_.pack[view_.dtype](view_, panel * width, rows(panel), begin, end,
                               of_b_ ? static_cast<int>(width) : rows(panel),
                               ahead * (view_.dtype == kFloat32 ? 4 : 2), out);
  }

  int64_t width, count;
  int64_t units;  // of one panel and block

 private:
  const GemmKernels& kernels_;
  const MatrixView& view_;
  const Blocks& blocks_;
  bool of_b_;
};

}  // namespace

bool has_bfloat16_dot(const std::string& capability) {
  const std::string name = kernels_for(capability).name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  return name == "avx512" && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const GemmKernels* gemm_kernels(int a_dtype, int b_dtype, const std::string& capability) {
  const std::string name = kernels_for(capability).name;
  if (a_dtype == kFloat16 || b_dtype == kFloat16) return nullptr;
#if defined(__x86_64__)
  if (a_dtype == kBFloat16 && b_dtype == kBFloat16 && has_bfloat16_dot(capability)) {
    return &kAvx512GemmBFloat16;
  }
  if (name == "avx512") return &kAvx512GemmFloat32;
  if (name == "avx2") return &kAvx2GemmFloat32;
#endif
  return nullptr;
}

void gemm(const GemmKernels& kernels, const MatrixView& a, const MatrixView& b, int64_t k, float* c,
          int64_t c_stride, bool add, int num_threads) {
  const Blocks blocks(k, kernels.per_unit);
  const Panels of_a(kernels, a, blocks, false), of_b(kernels, b, blocks, true);
  const bool b_passes = a.size <= b.size;
  const Panels& held = b_passes ? of_a : of_b;
  const Panels& passing = b_passes ? of_b : of_a;

  const Memory whole = allocate(blocks.count * held.count * held.units);
  parallel_for(held.count, blocks.count * held.units, num_threads, [&](int64_t panel) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      held.pack(panel, block, whole.get() + (block * held.count + panel) * held.units);
    }
  });
  // A unit of both panels takes about as long as two of the elements that parallel_for counts.
  const int64_t cost = 2 * blocks.count * passing.units * (held.count + 1);
  parallel_for(passing.count, cost, num_threads, [&](int64_t panel) {
    const Memory part = allocate(passing.units);
    for (int64_t block = 0; block < blocks.count; ++block) {
      passing.pack(panel, block, part.get());
      for (int64_t other = 0; other < held.count; ++other) {
        const uint32_t* kept = whole.get() + (block * held.count + other) * held.units;
        const int64_t p = b_passes ? other : panel, q = b_passes ? panel : other;
        kernels.multiply(b_passes ? kept : part.get(), b_passes ? part.get() : kept,
                         blocks.size(block), c + p * of_a.width * c_stride + q * of_b.width,
                         c_stride, of_a.rows(p), of_b.rows(q), add || block > 0);
      }
    }
  });
}

}  // namespace r1v3
