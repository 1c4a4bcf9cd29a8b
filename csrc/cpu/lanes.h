// What both row and loss kernels do with a vector F of kWidth floats of the including file.
#pragma once

namespace r1v3 {
namespace {

inline F broadcast(float value) { return value - F{}; }

inline double lane_sum(F value) {
  double result = 0.0;
  for (int i = 0; i < kWidth; ++i) result += value[i];
  return result;
}

}  // namespace
}  // namespace r1v3
