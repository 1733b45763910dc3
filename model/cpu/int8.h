// Linear layers in 8 bits.

#pragma once

#include "vectors.h"

namespace {

// y = x W^T + b with x rounded to 8 bits row by row and W to 8 bits output by output:
//   x = step (q - zero), q 0..255;  W = scale w, w -127..127
//   y = step scale (sum q w - zero sum w) + b
// The product takes quads: one int32 of the sum gets four q w. Weights are laid out in panels of
// PANEL outputs, (in / 4, PANEL) quads each.

const int PANEL = BLOCKS * LANES;

void quantize_row(const bf16* x, int64_t in, uint8_t* q, float* step, int32_t* zero) {
  __m512 least = _mm512_setzero_ps(), most = least;  // 0 is always representable
  __mmask16 not_a_number = 0;                          // min and max pass over it
  for (int64_t i = 0; i < in; i += 2 * LANES) {
    const Pair v = load(x + i);
    not_a_number |= _mm512_cmp_ps_mask(v.even, v.odd, _CMP_UNORD_Q);
    least = _mm512_min_ps(least, _mm512_min_ps(v.even, v.odd));
    most = _mm512_max_ps(most, _mm512_max_ps(v.even, v.odd));
  }
  const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
  const float size = high > low ? (high - low) / 255.0f : 1.0f;
  if (not_a_number || !(size <= 3.4e38f)) {  // every output of the row is to be NaN
    *step = NAN;
    *zero = 0;
    memset(q, 0, in);
    return;
  }
  *step = size;
  *zero = (int32_t)lrintf(-low / size);
  const __m512 rate = _mm512_set1_ps(1.0f / size);
  const __m512i shift = _mm512_set1_epi32(*zero);
  for (int64_t i = 0; i < in; i += LANES) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + i), rate));
    const __m512i shifted = _mm512_max_epi32(_mm512_add_epi32(whole, shift), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i*)(q + i), _mm512_cvtusepi32_epi8(shifted));
  }
}

struct Weights8 {
  int64_t in, out;
  const uint32_t* panels;  // (out / PANEL, in / 4, PANEL) quads
  const float* scales;     // (out,)
  const int32_t* sums;     // (out,)
  const bf16* bias;        // (out,) or 0
};

// M rows of y, PANEL of their outputs from `at`; with ADD they are added to what is there
template <int M, bool ADD>
inline void multiply8(const uint8_t* q, const float* steps, const int32_t* zeros, const Weights8& w,
                      int64_t at, bf16* y) {
  const uint32_t* panel = w.panels + at * (w.in / 4);
  __m512i sums[M][BLOCKS];
  each<M>([&](auto m) { each<BLOCKS>([&](auto b) { sums[m][b] = _mm512_setzero_si512(); }); });
  for (int64_t p = 0; p < w.in / 4; ++p) {
    __m512i column[BLOCKS];
    each<BLOCKS>([&](auto b) { column[b] = _mm512_loadu_si512(panel + p * PANEL + b * LANES); });
    each<M>([&](auto m) {
      int32_t quad;
      memcpy(&quad, q + m * w.in + 4 * p, 4);
      const __m512i row = _mm512_set1_epi32(quad);
      each<BLOCKS>([&](auto b) { sums[m][b] = _mm512_dpbusd_epi32(sums[m][b], row, column[b]); });
    });
  }
  each<BLOCKS>([&](auto b) {
    const int64_t o = at + b * LANES;
    const __m512 scale = _mm512_loadu_ps(w.scales + o);
    const __m512i all = _mm512_loadu_si512(w.sums + o);
    const __m512 bias = w.bias ? load16(w.bias + o) : _mm512_setzero_ps();
    each<M>([&](auto m) {
      const __m512i off = _mm512_mullo_epi32(all, _mm512_set1_epi32(zeros[m]));
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[m][b], off));
      __m512 value = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(steps[m])), bias);
      if (ADD) value = _mm512_add_ps(value, load16(y + m * w.out + o));
      store16(y + m * w.out + o, value);
    });
  });
}

template <bool ADD>
void multiply8_rows(const uint8_t* q, const float* steps, const int32_t* zeros, const Weights8& w,
                    bf16* y, int64_t rows) {
  for (int64_t at = 0; at < w.out; at += PANEL) {  // a panel stays in cache for all rows
    int64_t n = 0;
    for (; n + QUERIES <= rows; n += QUERIES)
      multiply8<QUERIES, ADD>(q + n * w.in, steps + n, zeros + n, w, at, y + n * w.out);
    for (; n < rows; ++n) multiply8<1, ADD>(q + n * w.in, steps + n, zeros + n, w, at, y + n * w.out);
  }
}

}  // namespace
