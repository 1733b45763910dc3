// What the serving forward does between its matrix products, for CPUs with AVX-512 bfloat16
// arithmetic: LayerNorm, GELU, attention with rotary positions, and LoRA's two thin products.
//
// Called through model/kernels.py, which checks shapes and says what each argument is; equal to
// model/layers.py up to rounding, which the tests hold it against. Everything is read and written
// as bfloat16 and computed in float32, rounded once at the end. Arrays are row-major. No function
// keeps state, so that threads may call them side by side. Built without GCC's partial redundancy
// elimination, which writes sums that are in registers to memory too (int8: half the speed).

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

// --- GELU ----------------------------------------------------------------------------------------

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

// --- LayerNorm -----------------------------------------------------------------------------------

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

// --- attention -----------------------------------------------------------------------------------
// The bfloat16 product takes pairs: one float32 of the sum gets a[0] b[0] + a[1] b[1]. So the keys
// of a head are laid out (D / 2, T) pairs of components, its values (T / 2, D) pairs of tokens, and
// a query's or a probability's pair is broadcast. QUERIES rows go together, so that what is loaded
// of the keys and values serves all of them and the sums stay in registers.

const int QUERIES = 6, BLOCKS = 4;  // 24 sums, 4 operands, 1 broadcast: of 32 registers

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// sums[m][b] = rows[m] (pairs, broadcast) . columns (pairs, stride) at block b
template <int M, int B>
inline __attribute__((always_inline)) void multiply(const uint32_t* rows, int64_t row_stride,
                                                    const uint32_t* columns, int64_t column_stride,
                                                    int64_t pairs, __m512 sums[M][B]) {
  __m512 held[M][B];
  each<M>([&](auto m) { each<B>([&](auto b) { held[m][b] = _mm512_setzero_ps(); }); });
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i column[B];
    each<B>([&](auto b) { column[b] = _mm512_loadu_si512(columns + p * column_stride + b * LANES); });
    each<M>([&](auto m) {
      const __m512i pair = _mm512_set1_epi32(rows[m * row_stride + p]);
      each<B>([&](auto b) { held[m][b] = _mm512_dpbf16_ps(held[m][b], as_bh(pair), as_bh(column[b])); });
    });
  }
  each<M>([&](auto m) { each<B>([&](auto b) { sums[m][b] = held[m][b]; }); });
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

template <int D>
struct Head {
  // Of one sequence: `length` tokens, padded to `padded`, a multiple of 2 * LANES.
  int64_t length, padded;
  uint32_t* keys;    // (D / 2, padded) pairs, rotated
  uint32_t* values;  // (padded / 2, D) pairs
  float* scores;     // (QUERIES, padded)
  bf16* shares;      // (QUERIES, padded), the exponentials
  bf16* queries;     // (QUERIES, D), rotated

  static int64_t bytes(int64_t longest) {
    const int64_t padded = up(longest, 2 * LANES);
    return padded * (4 * D + QUERIES * 6) + 2 * QUERIES * D + 64;
  }

  Head(char* scratch, int64_t longest) {
    const int64_t room = up(longest, 2 * LANES);
    keys = (uint32_t*)scratch;
    values = keys + D / 2 * room;
    scores = (float*)(values + D / 2 * room);
    shares = (bf16*)(scores + QUERIES * room);
    queries = shares + QUERIES * room;
  }

  // from (D,) turned by the angles of its position: model/layers.py's rotate
  static void rotate(const bf16* from, const float* cos, const float* sin, bf16* to) {
    for (int i = 0; i < D / 2; i += LANES) {
      const __m512 left = load16(from + i), right = load16(from + D / 2 + i);
      const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
      store16(to + i, _mm512_fnmadd_ps(right, s, _mm512_mul_ps(left, c)));
      store16(to + D / 2 + i, _mm512_fmadd_ps(left, s, _mm512_mul_ps(right, c)));
    }
  }

  void take(const bf16* k, const bf16* v, int64_t stride, const float* cos, const float* sin) {
    alignas(64) bf16 rotated[LANES][D];
    for (int64_t t = 0; t < padded; t += LANES) {
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t token = t + i;
        if (token < length)
          rotate(k + token * stride, cos + token * (D / 2), sin + token * (D / 2), rotated[i]);
        else
          memset(rotated[i], 0, sizeof rotated[i]);
      }
      for (int d = 0; d < D / 2; d += LANES) turn((const uint32_t*)rotated + d, keys + d * padded + t);
    }
    alignas(64) static const bf16 nothing[D] = {};
    for (int64_t t = 0; t < padded; t += 2) {
      const bf16* first = t < length ? v + t * stride : nothing;
      const bf16* second = t + 1 < length ? first + stride : nothing;
      for (int d = 0; d < D; d += LANES) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first + d)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second + d)));
        _mm512_storeu_si512(values + t / 2 * D + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }

  // 16 rows of 16 pairs, D / 2 apart, to columns `padded` apart
  void turn(const uint32_t* from, uint32_t* to) const {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * (D / 2));
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
      _mm512_storeu_si512(to + i * padded, _mm512_shuffle_i32x4(low, high, 0x88));
      _mm512_storeu_si512(to + (4 + i) * padded, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
      _mm512_storeu_si512(to + (8 + i) * padded, _mm512_shuffle_i32x4(low, high, 0xdd));
      _mm512_storeu_si512(to + (12 + i) * padded, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
  }

  template <int M, int B>
  void score(int64_t at) {
    __m512 sums[M][B];
    multiply<M, B>((const uint32_t*)queries, D / 2, keys + at, padded, D / 2, sums);
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b)
        _mm512_storeu_ps(scores + m * padded + at + b * LANES, sums[m][b]);
  }

  // softmax's numerators of query m into `shares`; 1 over their sum. `rate` is log2(e) / sqrt(D).
  float soften(int m, float rate) {
    float* row = scores + m * padded;
    for (int64_t t = length; t < padded; ++t) row[t] = -1e30f;  // finite: infinity less itself is NaN
    __m512 most = _mm512_loadu_ps(row);
    for (int64_t t = LANES; t < padded; t += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(row + t));
    const __m512 scale = _mm512_set1_ps(rate);
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(most) * rate);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 2 * LANES) {
      const __m512 low = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(row + t), scale, shift));
      const __m512 high = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(row + t + LANES), scale, shift));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      _mm512_storeu_si512(shares + m * padded + t, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
  }

  template <int M>
  void attend(const bf16* q, int64_t stride, const float* cos, const float* sin, bf16* out,
              int64_t out_stride) {
    for (int m = 0; m < M; ++m)
      rotate(q + m * stride, cos + m * (D / 2), sin + m * (D / 2), queries + m * D);
    int64_t at = 0;
    for (; at + BLOCKS * LANES <= padded; at += BLOCKS * LANES) score<M, BLOCKS>(at);
    for (; at < padded; at += 2 * LANES) score<M, 2>(at);
    float inverse[M];
    const float rate = 1.44269504f / sqrtf(D);
    for (int m = 0; m < M; ++m) inverse[m] = soften(m, rate);
    const int B = D / LANES < BLOCKS ? D / LANES : BLOCKS;
    for (int d = 0; d < D; d += B * LANES) {
      __m512 sums[M][B];
      multiply<M, B>((const uint32_t*)shares, padded / 2, values + d, D, (length + 1) / 2, sums);
      for (int m = 0; m < M; ++m)
        for (int b = 0; b < B; ++b)
          store16(out + m * out_stride + d + b * LANES,
                  _mm512_mul_ps(sums[m][b], _mm512_set1_ps(inverse[m])));
    }
  }

  void run(int64_t tokens, const bf16* q, const bf16* k, const bf16* v, int64_t stride,
           const float* cos, const float* sin, bf16* out, int64_t out_stride) {
    length = tokens;
    padded = up(tokens, 2 * LANES);
    take(k, v, stride, cos, sin);
    for (int64_t t = 0; t < length; t += QUERIES) {
      const bf16* from = q + t * stride;
      const float *c = cos + t * (D / 2), *s = sin + t * (D / 2);
      bf16* to = out + t * out_stride;
      switch (length - t < QUERIES ? length - t : QUERIES) {
        case 1: attend<1>(from, stride, c, s, to, out_stride); break;
        case 2: attend<2>(from, stride, c, s, to, out_stride); break;
        case 3: attend<3>(from, stride, c, s, to, out_stride); break;
        case 4: attend<4>(from, stride, c, s, to, out_stride); break;
        case 5: attend<5>(from, stride, c, s, to, out_stride); break;
        default: attend<6>(from, stride, c, s, to, out_stride);
      }
    }
  }
};

template <int D>
int attention_of(const bf16* qkv, const float* cos, const float* sin, const int64_t* starts,
                 const int64_t* lengths, int64_t rows, int64_t heads, bf16* out) {
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; ++r) longest = lengths[r] > longest ? lengths[r] : longest;
  char* scratch = (char*)aligned_alloc(64, up(Head<D>::bytes(longest), 64));
  if (!scratch) return 1;
  Head<D> head(scratch, longest);
  const int64_t width = heads * D;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const bf16* q = qkv + starts[r] * 3 * width + h * D;
      head.run(lengths[r], q, q + width, q + 2 * width, 3 * width, cos, sin,
               out + starts[r] * width + h * D, width);
    }
  free(scratch);
  return 0;
}

// --- LoRA ----------------------------------------------------------------------------------------

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

// --- int8 ----------------------------------------------------------------------------------------
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

#define API extern "C" __attribute__((visibility("default")))

// y[s] = LayerNorm of x[s] (tokens, width) under weights[s], biases[s] (width; 0: none), for the
// tokens starts[s]..ends[s] of each of `count` segments; width a multiple of 32.
API void trunkline_norm(const bf16* x, bf16* y, int64_t width, float eps, int64_t count,
                        const int64_t* starts, const int64_t* ends, const int64_t* weights,
                        const int64_t* biases) {
  for (int64_t s = 0; s < count; ++s)
    for (int64_t n = starts[s]; n < ends[s]; ++n)
      norm_row(x + n * width, (const bf16*)weights[s], (const bf16*)biases[s], y + n * width, width, eps);
}

// out (N, heads * D) = attention within each sequence of qkv (N, 3 heads * D); q and k are rotated
// by cos, sin (positions, D / 2) float32. Not 0: there was no memory, or D is not 32, 64 or 128.
API int trunkline_attention(const bf16* qkv, const float* cos, const float* sin, const int64_t* starts,
                            const int64_t* lengths, int64_t rows, int64_t heads, int64_t head_dim,
                            bf16* out) {
  switch (head_dim) {
    case 32: return attention_of<32>(qkv, cos, sin, starts, lengths, rows, heads, out);
    case 64: return attention_of<64>(qkv, cos, sin, starts, lengths, rows, heads, out);
    case 128: return attention_of<128>(qkv, cos, sin, starts, lengths, rows, heads, out);
    default: return 1;
  }
}

// y[s] (tokens, out) += (x[s] (tokens, in) . a[s]^T (ranks[s], in)) . b[s] (ranks[s], out), then GELU
// of y[s] where `gelu`; a segment whose a is 0 has no LoRA here. in, out multiples of 32. Not 0:
// there was no memory.
API int trunkline_lora(const bf16* x, int64_t in, bf16* y, int64_t out, int64_t count,
                       const int64_t* starts, const int64_t* ends, const int64_t* a, const int64_t* b,
                       const int64_t* ranks, int gelu) {
  int64_t most_rows = 0, most_ranks = 0;
  for (int64_t s = 0; s < count; ++s)
    if (a[s]) {
      most_rows = ends[s] - starts[s] > most_rows ? ends[s] - starts[s] : most_rows;
      most_ranks = ranks[s] > most_ranks ? ranks[s] : most_ranks;
    }
  most_ranks = up(most_ranks, GROUP);
  char* scratch = nullptr;
  if (most_ranks) {
    scratch = (char*)aligned_alloc(64, up(most_ranks * 2 * (out + most_rows), 64));
    if (!scratch) return 1;
  }
  uint32_t* paired = (uint32_t*)scratch;
  bf16* low = (bf16*)scratch + most_ranks * out;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t rows = ends[s] - starts[s];
    bf16* to = y + starts[s] * out;
    if (a[s]) {
      const int64_t wide = up(ranks[s], GROUP);
      shrink_rows(x + starts[s] * in, in, (const bf16*)a[s], ranks[s], low, wide, rows);
      pair_up((const bf16*)b[s], ranks[s], wide / 2, out, paired);
      (gelu ? expand_ranks<true> : expand_ranks<false>)(low, paired, wide / 2, to, rows, out);
    } else if (gelu) {
      gelu_row(to, rows * out);
    }
  }
  free(scratch);
  return 0;
}

// y (rows, out) = x (rows, in) W^T + bias, or added to y where `add`, in 8 bits. panels, scales and
// sums are those of Weights8; in a multiple of 32, out of 64. Not 0: there was no memory.
API int trunkline_linear8(const bf16* x, int64_t rows, int64_t in, int64_t out, const uint32_t* panels,
                          const float* scales, const int32_t* sums, const bf16* bias, int add, bf16* y) {
  const int64_t steps_at = up(rows * in, 64), zeros_at = up(steps_at + rows * 4, 64);
  char* scratch = (char*)aligned_alloc(64, up(zeros_at + rows * 4, 64));
  if (!scratch) return 1;
  uint8_t* q = (uint8_t*)scratch;
  float* steps = (float*)(scratch + steps_at);
  int32_t* zeros = (int32_t*)(scratch + zeros_at);
  for (int64_t n = 0; n < rows; ++n) quantize_row(x + n * in, in, q + n * in, steps + n, zeros + n);
  const Weights8 weights = {in, out, panels, scales, sums, bias};
  (add ? multiply8_rows<true> : multiply8_rows<false>)(q, steps, zeros, weights, y, rows);
  free(scratch);
  return 0;
}
