// LoRA: two thin products, and GELU where it follows.

#pragma once

#include "vectors.h"

namespace {

const int GROUP = 8;  // ranks that are summed together

// The sums over 8 registers' lanes, side by side.
inline __m256 sums_of(const __m512 x[GROUP]) {
  __m256 half[GROUP];
  for (int i = 0; i < GROUP; ++i)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// low[m] (GROUP of its ranks) = x[m] (in) . a (GROUP, in), rows beyond `ranks` being zero
template <int M>
inline void shrink(const bf16* x, int64_t in, const bf16* a, int64_t ranks, bf16* low, int64_t low_stride) {
  __m512 sums[M][GROUP];
  each<M>([&](auto m) { each<GROUP>([&](auto r) { sums[m][r] = _mm512_setzero_ps(); }); });
  for (int64_t i = 0; i < in; i += 2 * LANES) {
    __m512i row[M];
    each<M>([&](auto m) { row[m] = _mm512_loadu_si512(x + m * in + i); });
    each<GROUP>([&](auto r) {
      // a rank that is not there repeats the last: it is cut off below
      const __m512i column = _mm512_loadu_si512(a + (r < ranks ? r : ranks - 1) * in + i);
      each<M>([&](auto m) { sums[m][r] = _mm512_dpbf16_ps(sums[m][r], as_bh(row[m]), as_bh(column)); });
    });
  }
  const __mmask8 there = ranks >= GROUP ? 0xff : (1 << ranks) - 1;
  each<M>([&](auto m) {
    const __m256 whole = _mm256_maskz_mov_ps(there, sums_of(sums[m]));
    _mm_storeu_si128((__m128i*)(low + m * low_stride), (__m128i)_mm256_cvtneps_pbh(whole));
  });
}

// b (ranks, out) as (out / 32, pairs of ranks, 2, 16): the even and the odd ones of 32 outputs
void pair_up(const bf16* b, int64_t ranks, int64_t pairs, int64_t out, uint32_t* to) {
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  for (int64_t o = 0; o < out; o += 2 * LANES)
    for (int64_t p = 0; p < pairs; ++p, to += 2 * LANES) {
      __m512i first = _mm512_setzero_si512(), second = first;
      if (2 * p < ranks) first = _mm512_loadu_si512(b + 2 * p * out + o);
      if (2 * p + 1 < ranks) second = _mm512_loadu_si512(b + (2 * p + 1) * out + o);
      _mm512_storeu_si512(to, _mm512_or_si512(_mm512_and_si512(first, low_half), _mm512_slli_epi32(second, 16)));
      _mm512_storeu_si512(to + LANES, _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_andnot_si512(low_half, second)));
    }
}

// y[m] += low[m] . b, then GELU where asked for. P is the pairs of ranks, or 0 for any number.
template <int M, int P, bool GELU>
inline void expand(const uint32_t* low, const uint32_t* b, int64_t any_pairs, bf16* y, int64_t out) {
  const int64_t pairs = P ? P : any_pairs;
  __m512i held[M][P ? P : 1];
  each<M>([&](auto m) { each<P>([&](auto p) { held[m][p] = _mm512_set1_epi32(low[m * pairs + p]); }); });
  for (int64_t o = 0; o < out; o += 2 * LANES, b += pairs * 2 * LANES) {
    Pair sums[M];
    each<M>([&](auto m) { sums[m] = load(y + m * out + o); });
    const auto add = [&](int64_t p, auto pair_of) {
      const __m512bh even = as_bh(_mm512_loadu_si512(b + p * 2 * LANES));
      const __m512bh odd = as_bh(_mm512_loadu_si512(b + p * 2 * LANES + LANES));
      each<M>([&](auto m) {
        const __m512bh pair = as_bh(pair_of(m));
        sums[m].even = _mm512_dpbf16_ps(sums[m].even, pair, even);
        sums[m].odd = _mm512_dpbf16_ps(sums[m].odd, pair, odd);
      });
    };
    if constexpr (P > 0)
      each<P>([&](auto p) { add(p, [&](auto m) { return held[m][p]; }); });
    else
      for (int64_t p = 0; p < pairs; ++p)
        add(p, [&](auto m) { return _mm512_set1_epi32(low[m * pairs + p]); });
    each<M>([&](auto m) {
      if (GELU) sums[m] = {gelu(sums[m].even), gelu(sums[m].odd)};
      store(y + m * out + o, sums[m]);
    });
  }
}

template <int P, bool GELU>
void expand_rows(const bf16* low, const uint32_t* b, int64_t pairs, bf16* y, int64_t rows, int64_t out) {
  const uint32_t* from = (const uint32_t*)low;
  int64_t n = 0;
  for (; n + 4 <= rows; n += 4) expand<4, P, GELU>(from + n * pairs, b, pairs, y + n * out, out);
  for (; n < rows; ++n) expand<1, P, GELU>(from + n * pairs, b, pairs, y + n * out, out);
}

template <bool GELU>
void expand_ranks(const bf16* low, const uint32_t* b, int64_t pairs, bf16* y, int64_t rows, int64_t out) {
  switch (pairs) {
    case 4: return expand_rows<4, GELU>(low, b, pairs, y, rows, out);
    default: return expand_rows<0, GELU>(low, b, pairs, y, rows, out);
  }
}

void shrink_rows(const bf16* x, int64_t in, const bf16* a, int64_t ranks, bf16* low, int64_t low_stride,
                 int64_t rows) {
  for (int64_t r = 0; r < ranks; r += GROUP) {
    const bf16* from = a + r * in;
    int64_t n = 0;
    for (; n + 3 <= rows; n += 3)
      shrink<3>(x + n * in, in, from, ranks - r, low + n * low_stride + r, low_stride);
    for (; n < rows; ++n) shrink<1>(x + n * in, in, from, ranks - r, low + n * low_stride + r, low_stride);
  }
}

}  // namespace
