// Registers of float32 and bfloat16 (AVX-512): loading, storing, and functions of them.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

namespace {

typedef uint16_t bf16;

const int LANES = 16;  // float32 in a register; a register of bfloat16 has twice as many

// f(0) to f(N - 1), written out: arrays of sums then are registers, which they are not in a loop.
template <int N, class F>
inline __attribute__((always_inline)) void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

inline __m512bh as_bh(__m512i v) { return (__m512bh)v; }

// --- 32 bfloat16 as two registers of float32: those at even places and those at odd ones ---------

struct Pair {
  __m512 even, odd;
};

inline Pair load(const bf16* from) {
  const __m512i raw = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(0xffff0000)))};
}

inline void store(bf16* to, Pair x) {
  // (odd, even) rounded side by side, then shuffled like cards
  const __m512i side_by_side = (__m512i)_mm512_cvtne2ps_pbh(x.odd, x.even);
  const __m512i first = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(first, side_by_side));
}

inline __m512 load16(const bf16* from) {
  const __m256i raw = _mm256_loadu_si256((const __m256i*)from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store16(bf16* to, __m512 x) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
}

const int QUERIES = 6, BLOCKS = 4;  // rows and registers of a product: 24 sums, 4 operands, 1 broadcast

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }


// x/2 (1 + erf(x / sqrt 2)). erf(x / sqrt 2) = x P(x^2) for |x| <= 4.25, a least squares fit in
// Chebyshev polynomials, scaled to pass 1 at its end and cut there: at most 3e-5 of x off.
inline __m512 gelu(__m512 x) {
  const __m512 end = _mm512_set1_ps(4.25f), one = _mm512_set1_ps(1.0f);
  const __m512 cut = _mm512_max_ps(_mm512_min_ps(x, end), _mm512_sub_ps(_mm512_setzero_ps(), end));
  const __m512 u = _mm512_mul_ps(cut, cut);
  const float P[] = {0.797892809f, -0.132903114f, 0.0198435709f, -0.00231314101f,
                     0.000210373299f, -1.46311913e-05f, 7.43409601e-07f, -2.56558543e-08f,
                     5.31515776e-10f, -4.9495746e-12f};
  __m512 p = _mm512_set1_ps(P[9]);
  for (int i = 8; i >= 0; --i) p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(P[i]));
  __m512 erf = _mm512_mul_ps(p, cut);
  erf = _mm512_max_ps(_mm512_min_ps(erf, one), _mm512_sub_ps(_mm512_setzero_ps(), one));
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, erf, half);
}

void gelu_row(bf16* x, int64_t width) {
  for (int64_t i = 0; i < width; i += 2 * LANES) {
    const Pair v = load(x + i);
    store(x + i, {gelu(v.even), gelu(v.odd)});
  }
}

// 2^x for x <= 0, to 4e-6 of the value; 0 for what is too small
inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);  // -1/2 to 1/2: Taylor's series of 2^part
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Memory of a thread's own that grows and stays: fresh pages cost more than what is computed in them.
struct Scratch {
  char* at = nullptr;
  int64_t bytes = 0;

  ~Scratch() { free(at); }

  // 0 where there is not so much. What was handed out before is not to be used any more.
  char* of(int64_t wanted) {
    if (bytes < wanted) {
      free(at);
      at = (char*)aligned_alloc(64, up(wanted, 64));
      bytes = at ? wanted : 0;
    }
    return at;
  }
};

// 16 rows of 16 pairs to 16 columns; rows beyond `rows` are zero. Strides are in pairs.
inline void turn(const uint32_t* from, int64_t stride, int64_t rows, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // a[4 g + i]: columns i, 4 + i, 8 + i, 12 + i of rows 4 g to 4 g + 3
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

}  // namespace
