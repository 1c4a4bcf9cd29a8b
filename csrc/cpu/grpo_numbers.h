// Vectors F of kWidth floats of the including file, as numbers of the GRPO loss. No library templates
// here, see rows_impl.h.
#pragma once

#include <stdint.h>

#include "lanes.h"

namespace r1v3 {
namespace {

typedef int32_t Lanes __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

inline F choose(Lanes mask, F a, F b) { return mask ? a : b; }
inline F only(Lanes mask, F a) { return (F)(mask & (Lanes)a); }

struct Exponential {
  F value;   // exp(x)
  F excess;  // exp(x) - 1
  F beyond;  // exp(x) - 1 - x
};

// For |x| <= 20, to some units in the last place, the differences too; NaN stays.
__attribute__((always_inline)) inline Exponential exponential(F x) {
  const F magic = broadcast(0x1.8p23f);  // adding it rounds to an integer, left in the low bits
  const F shifted = x * 1.44269504f + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const F r2 = r * r;
  const F low = r * (1.0f / 6) + 0.5f, middle = r * (1.0f / 120) + 1.0f / 24;
  const F high = r * (1.0f / 5040) + 1.0f / 720;
  const F beyond = ((high * r2 + middle) * r2 + low) * r2, excess = beyond + r;
  const F power = (F)(((Lanes)shifted - (Lanes)magic + 127) << 23);
  const F value = power * excess + power;
  // Around 0 nothing was subtracted.
  const Lanes near = n == F{};
  const F other = value - 1.0f;
  return {value, choose(near, excess, other), choose(near, beyond, other - x)};
}

}  // namespace
}  // namespace r1v3
