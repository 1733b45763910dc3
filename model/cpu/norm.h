// LayerNorm.

#pragma once

#include "vectors.h"

namespace {

inline float total(Pair sums) { return _mm512_reduce_add_ps(_mm512_add_ps(sums.even, sums.odd)); }

void norm_row(const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int64_t width, float eps) {
  Pair sums = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < width; i += 2 * LANES) {
    const Pair v = load(x + i);
    sums = {_mm512_add_ps(sums.even, v.even), _mm512_add_ps(sums.odd, v.odd)};
  }
  const __m512 mean = _mm512_set1_ps(total(sums) / width);
  Pair squares = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < width; i += 2 * LANES) {
    const Pair v = load(x + i);
    const Pair d = {_mm512_sub_ps(v.even, mean), _mm512_sub_ps(v.odd, mean)};
    squares = {_mm512_fmadd_ps(d.even, d.even, squares.even),
               _mm512_fmadd_ps(d.odd, d.odd, squares.odd)};
  }
  const __m512 rate = _mm512_set1_ps(1.0f / sqrtf(total(squares) / width + eps));
  for (int64_t i = 0; i < width; i += 2 * LANES) {
    const Pair v = load(x + i), w = load(weight + i);
    Pair b = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (bias) b = load(bias + i);
    store(y + i, {_mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(v.even, mean), rate), w.even, b.even),
                  _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(v.odd, mean), rate), w.odd, b.odd)});
  }
}

}  // namespace
