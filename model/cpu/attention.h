// Attention with rotary positions, within each of several sequences.

#pragma once

#include "tiles.h"

namespace {

// The bfloat16 product takes pairs: one float32 of the sum gets a[0] b[0] + a[1] b[1]. So the keys
// of a head are laid out (D / 2, T) pairs of components, its values (T / 2, D) pairs of tokens, and
// a query's or a probability's pair is broadcast. QUERIES rows go together, so that what is loaded
// of the keys and values serves all of them and the sums stay in registers; or with AMX, whose tiles
// take the same pairs, TILE_ROWS of them.

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

template <int D>
struct Head {
  // Of one sequence: `length` tokens, padded to `padded`, a multiple of 2 * LANES.
  const bool tiles;  // whether it is multiplied by AMX
  int64_t length, padded;
  uint32_t* keys;    // (D / 2, padded) pairs, rotated
  uint32_t* values;  // (padded / 2, D) pairs
  float* scores;     // (TILE_ROWS, padded)
  bf16* shares;      // (TILE_ROWS, padded), the exponentials
  bf16* queries;     // (TILE_ROWS, D), rotated

  static int64_t bytes(int64_t longest) {
    const int64_t padded = up(longest, 2 * LANES);
    return padded * (4 * D + TILE_ROWS * 6) + 2 * TILE_ROWS * D + 64;
  }

  Head(char* scratch, int64_t longest, bool with_tiles) : tiles(with_tiles) {
    const int64_t room = up(longest, 2 * LANES);
    keys = (uint32_t*)scratch;
    values = keys + D / 2 * room;
    scores = (float*)(values + D / 2 * room);
    shares = (bf16*)(scores + TILE_ROWS * room);
    queries = shares + TILE_ROWS * room;
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
      for (int d = 0; d < D / 2; d += LANES) 
        turn((const uint32_t*)rotated + d, D / 2, LANES, keys + d * padded + t, padded);
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
    for (int64_t t = length; t < padded; ++t) row[t] = -1.5e38f;  // finite: infinity less itself is NaN
    __m512 most = _mm512_loadu_ps(row);
    for (int64_t t = LANES; t < padded; t += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(row + t));
    // Scaled after the largest is taken off: the other way round its rounding grows with its size.
    const __m512 scale = _mm512_set1_ps(rate), top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    const auto share = [&](const float* from) {
      return exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from), top), scale));
    };
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 2 * LANES) {
      const __m512 low = share(row + t), high = share(row + t + LANES);
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

  // The same for `count` of TILE_ROWS queries; what the other rows of the tiles give is not read.
  void attend_tiled(int64_t count, const bf16* q, int64_t stride, const float* cos, const float* sin,
                    bf16* out, int64_t out_stride) {
    for (int64_t m = 0; m < count; ++m)
      rotate(q + m * stride, cos + m * (D / 2), sin + m * (D / 2), queries + m * D);
    const int STEPS = D / TILE_DEPTH;
    each<STEPS>([&](auto k) { tile_load<4 + k>(queries + k * TILE_DEPTH, 2 * D); });
    for (int64_t at = 0; at < padded; at += 2 * LANES) {
      each<2>([&](auto b) { tile_zero<b>(); });
      each<STEPS>([&](auto k) {
        each<2>([&](auto b) {
          tile_load<2 + b>(keys + k * LANES * padded + at + b * LANES, 4 * padded);
          tile_multiply<b, 4 + k, 2 + b>();
        });
      });
      each<2>([&](auto b) { tile_store<b>(scores + at + b * LANES, 4 * padded); });
    }
    float inverse[TILE_ROWS];
    for (int64_t m = 0; m < count; ++m) inverse[m] = soften(m, 1.44269504f / sqrtf(D));
    for (int64_t d = 0; d < D; d += 2 * LANES) {
      each<2>([&](auto b) { tile_zero<b>(); });
      for (int64_t t = 0; t < padded; t += TILE_DEPTH) {
        tile_load<4>(shares + t, 2 * padded);
        each<2>([&](auto b) {
          tile_load<2 + b>(values + t / 2 * D + d + b * LANES, 4 * D);
          tile_multiply<b, 4, 2 + b>();
        });
      }
      alignas(64) float sums[TILE_ROWS][2 * LANES];
      each<2>([&](auto b) { tile_store<b>(&sums[0][b * LANES], sizeof sums[0]); });
      for (int64_t m = 0; m < count; ++m)
        each<2>([&](auto b) {
          store16(out + m * out_stride + d + b * LANES,
                  _mm512_mul_ps(_mm512_load_ps(&sums[m][b * LANES]), _mm512_set1_ps(inverse[m])));
        });
    }
  }

  void run(int64_t tokens, const bf16* q, const bf16* k, const bf16* v, int64_t stride,
           const float* cos, const float* sin, bf16* out, int64_t out_stride) {
    length = tokens;
    padded = up(tokens, 2 * LANES);
    take(k, v, stride, cos, sin);
    const int64_t step = tiles ? TILE_ROWS : QUERIES;
    for (int64_t t = 0; t < length; t += step) {
      const bf16* from = q + t * stride;
      const float *c = cos + t * (D / 2), *s = sin + t * (D / 2);
      bf16* to = out + t * out_stride;
      if (tiles) {
        attend_tiled(length - t < step ? length - t : step, from, stride, c, s, to, out_stride);
        continue;
      }
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
                 const int64_t* lengths, int64_t rows, int64_t heads, bool tiles, bf16* out) {
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; ++r) longest = lengths[r] > longest ? lengths[r] : longest;
  static thread_local Scratch memory;
  char* scratch = memory.of(Head<D>::bytes(longest));
  if (!scratch) return 1;
  Head<D> head(scratch, longest, tiles);
  const int64_t width = heads * D;
  const auto all = [&] {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        const bf16* q = qkv + starts[r] * 3 * width + h * D;
        head.run(lengths[r], q, q + width, q + 2 * width, 3 * width, cos, sin,
                 out + starts[r] * width + h * D, width);
      }
  };
  if (tiles) {
    const Tiles set_up;
    all();
  } else {
    all();
  }
  return 0;
}

}  // namespace
