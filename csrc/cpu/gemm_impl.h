// The parts of the product that are compiled for an instruction set, over the including file's
//   Units, F, kLanes: vectors of so many units, and of float
//   kPerUnit: elements that make a unit of 32 bits
//   kMostRows: rows of a in a panel; twice as many sums, two vectors of b and one of a are registers
//   load_units(x), store(x, units, n): whole vectors of units, and the first n
//   transpose(units), broadcast(unit), multiply_add, load_sums(x, n), store_sums(x, sums, n)
// and, for each type of element:
//   load_all(x), load(x, n): units of contiguous elements; of the first n, 0 for the rest
//   neighbors(x, k_stride, n, pairs): units of elements x[i] and, if `pairs`, x[k_stride + i]
//   unit_of(x, k_stride, pairs): the first of them
// No library template may be instantiated here: see rows_impl.h.
#pragma once

#include <stdint.h>

#include "gemm.h"

namespace r1v3 {
namespace {

constexpr int kColumns = 2 * kLanes;
constexpr int kLaneElements = kLanes * kPerUnit;

inline void fetch(const void* x, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(x) + ahead, 0, 2);
}

// Up to kLanes rows of contiguous k.
template <bool Whole, typename Element>
void pack_rows(const Element* x, int64_t stride, int rows, int64_t n, int width, int lanes,
               int64_t ahead, uint32_t* panel) {
  for (int64_t k = 0; k < n; k += kLaneElements) {
    const bool whole = Whole && n - k >= kLaneElements;
    Units units[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const Element* from = x + i * stride + k;
      if (whole) {
        units[i] = load_all(from);
      } else {
        units[i] = i < rows ? load(from, n - k) : Units{};
      }
      if (Whole || i < rows) fetch(from, ahead);
    }
    transpose(units);
    uint32_t* to = panel + k / kPerUnit * width;
    const int64_t depth = (n - k + kPerUnit - 1) / kPerUnit;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (whole || i < depth) store(to + i * width, units[i], lanes);
    }
  }
}

// Rows that are neighbors in memory.
template <typename Element>
void pack_columns(const Element* x, int64_t k_stride, int rows, int64_t n, int width,
                  int64_t ahead, uint32_t* panel) {
  for (int64_t k = 0; k < n; k += kPerUnit) {
    for (int lane = 0; lane < width; lane += kLanes) {
      const Element* from = x + k * k_stride + lane;
      const int exist = rows > lane ? rows - lane : 0;
      for (int i = 0; i < kPerUnit; ++i) fetch(from + i * k_stride, ahead);
      store(panel + k / kPerUnit * width + lane,
            neighbors(from, k_stride, exist, k + kPerUnit <= n), width - lane);
    }
  }
}

template <typename Element>
void pack_elements(const Element* x, int64_t stride, int64_t k_stride, int rows, int64_t n,
                   int width, uint32_t* panel) {
  for (int64_t k = 0; k < n; k += kPerUnit) {
    for (int i = 0; i < width; ++i) {
      const Element* from = x + i * stride + k * k_stride;
      panel[k / kPerUnit * width + i] = i < rows ? unit_of(from, k_stride, k + kPerUnit <= n) : 0;
    }
  }
}

template <typename Element>
void pack(const MatrixView& view, int64_t first, int rows, int64_t begin, int64_t end, int width,
          int64_t ahead, uint32_t* panel) {
  const Element* x =
      static_cast<const Element*>(view.data) + first * view.stride + begin * view.k_stride;
  if (view.k_stride != 1 && view.stride != 1) {
    pack_elements(x, view.stride, view.k_stride, rows, end - begin, width, panel);
  } else if (view.k_stride != 1) {
    pack_columns(x, view.k_stride, rows, end - begin, width, ahead, panel);
  } else {
    for (int lane = 0; lane < width; lane += kLanes) {
      const auto pack_lanes = rows - lane >= kLanes ? pack_rows<true, Element> : pack_rows<false, Element>;
      pack_lanes(x + lane * view.stride, view.stride, rows - lane, end - begin, width,
                 width - lane, ahead, panel + lane);
    }
  }
}

template <int Rows>
void multiply_rows(const uint32_t* a, const uint32_t* b, int64_t units, float* c,
                   int64_t c_stride, int columns, bool add) {
  F sums[Rows][2];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
    sums[i][0] = sums[i][1] = F{};
    __builtin_prefetch(c + i * c_stride, 1);
    __builtin_prefetch(c + i * c_stride + columns - 1, 1);
  }
  for (int64_t k = 0; k < units; ++k) {
    const Units left = load_units(b + k * kColumns), right = load_units(b + k * kColumns + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      const Units unit = broadcast(a[k * Rows + i]);
      sums[i][0] = multiply_add(unit, left, sums[i][0]);
      sums[i][1] = multiply_add(unit, right, sums[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* out = c + i * c_stride + half * kLanes;
      const int n = columns - half * kLanes;
      F value = sums[i][half];
      if (add) value += load_sums(out, n);
      store_sums(out, value, n);
    }
  }
}

using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int, bool);

// A function for every number of rows.
template <int N, int... I>
struct UpTo : UpTo<N - 1, N, I...> {};
template <int... I>
struct UpTo<0, I...> {
  static constexpr Multiply multiply[] = {multiply_rows<I>...};
};

void multiply(const uint32_t* a, const uint32_t* b, int64_t units, float* c, int64_t c_stride,
              int rows, int columns, bool add) {
  UpTo<kMostRows>::multiply[rows - 1](a, b, units, c, c_stride, columns, add);
}

}  // namespace
}  // namespace r1v3
