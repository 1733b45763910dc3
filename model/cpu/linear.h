// Linear layers with AMX: y = x W^T + bias, each segment with its LoRA, then GELU or a sum, in one go.
//
// Rows are taken in blocks of 16 that stay within a segment, and copied into tiles first: a tile whose
// rows lie apart takes twice as long to load. W is laid out in panels of PANEL_WIDTH outputs. A
// panel's part of CHUNK inputs stays in the first cache while a group of blocks, which stays in the
// second, passes by it. LoRA's second product is some steps more of the same sums, so that y is
// written once. A block has two tiles of sums; two others are stored and finished meanwhile.

#pragma once

#include "tiles.h"

namespace {

const int PANEL_WIDTH = 2 * LANES;
const int GROUP_BLOCKS = 8;
const int64_t CHUNK = 384;  // inputs, at most

// w (rows, in) as (rows / width, in / 32, width / 16, 16 pairs of in, 16 rows), zero beyond `rows`
void lay_panels(const bf16* w, int64_t rows, int64_t width, int64_t in, bf16* to) {
  for (int64_t o = 0; o < rows; o += width)
    for (int64_t i = 0; i < in; i += TILE_DEPTH)
      for (int64_t n = o; n < o + width; n += LANES, to += TILE_SIZE)
        turn((const uint32_t*)(w + n * in + i), in / 2, rows - n, (uint32_t*)to, LANES);
}

// b (ranks, out) as (out / 32, steps, 2, pairs of ranks, 16 outputs), zero beyond `ranks`
void lay_columns(const bf16* b, int64_t ranks, int64_t steps, int64_t pairs, int64_t out, bf16* to) {
  alignas(64) uint16_t order[4 * LANES];  // of two rows of 32: their first 16 in pairs, their last
  for (int i = 0; i < 2 * LANES; ++i) order[2 * i] = i, order[2 * i + 1] = i + 2 * LANES;
  const __m512i first = _mm512_load_si512(order), last = _mm512_load_si512(order + 2 * LANES);
  for (int64_t o = 0; o < out; o += PANEL_WIDTH)
    for (int64_t r = 0; r < steps * 2 * pairs; r += 2 * pairs, to += 2 * pairs * TILE_DEPTH)
      for (int64_t p = 0; p < pairs; ++p) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (r + 2 * p < ranks) even = _mm512_loadu_si512(b + (r + 2 * p) * out + o);
        if (r + 2 * p + 1 < ranks) odd = _mm512_loadu_si512(b + (r + 2 * p + 1) * out + o);
        _mm512_store_si512(to + p * TILE_DEPTH, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(to + (pairs + p) * TILE_DEPTH, _mm512_permutex2var_epi16(even, last, odd));
      }
}

struct Segment {
  int64_t start, end;
  const bf16 *a, *b;  // 0: no LoRA
  int64_t ranks;
};

// How deep LoRA's second products are, for all of a call: as deep as the most ranks, up to a tile.
struct Depth {
  int64_t pairs;

  explicit Depth(int64_t most_ranks) : pairs(up(most_ranks < TILE_DEPTH ? most_ranks : TILE_DEPTH, 2) / 2) {}
  int64_t steps(int64_t ranks) const { return ranks ? (ranks + 2 * pairs - 1) / (2 * pairs) : 0; }
};

// What one adapter's LoRA is laid out to.
struct Laid {
  int64_t ranks, steps;
  bf16 *shrink, *expand;  // panels of a, columns of b
};

// Rows first..last are wanted of the 16 that begin at `from`.
struct Block {
  int64_t from, first, last;
  const Laid* lora;
};

// The next rows of n..end in an array of `all`, at least 16; the last block may begin before n.
inline Block next_block(int64_t n, int64_t end, int64_t all, const Laid* lora) {
  const int64_t from = n + TILE_ROWS <= all ? n : all - TILE_ROWS;
  return {from, n - from, end - from < TILE_ROWS ? end - from : TILE_ROWS, lora};
}

struct LinearCall {
  const bf16* x;  // (rows, in)
  int64_t rows, in, out;
  const bf16* panels;  // of W
  const bf16* bias;    // (out,) or 0
  bf16* y;             // (rows, out)
};

// Blocks that are taken together, and what is made of them.
struct Group {
  int64_t count;
  Block blocks[GROUP_BLOCKS];
  bf16 *x, *low;  // of each block (in / 32, 16, 32), (most steps, 16, 32): its rows, and x a^T
  float* sums;    // of each block (2, 16, 16): so far, where there are several chunks
  float* bias;    // (out,)
  int64_t in, most_steps, pairs;

  const bf16* rows(int64_t block) const { return x + block * in * TILE_ROWS; }
  bf16* lows(int64_t block) const { return low + block * most_steps * TILE_SIZE; }
  float* so_far(int64_t block) const { return sums + block * 2 * TILE_ROWS * LANES; }
};

// sums (tiles S and S + 1) += rows . panel. `beside(i)` is done while the tiles of i are multiplied.
template <int S, class F>
inline void add_products(const bf16* rows, const bf16* panel, int64_t depth, F beside) {
  for (int64_t i = 0; i < depth; i += TILE_DEPTH, panel += 2 * TILE_SIZE, rows += TILE_SIZE) {
    tile_load<4>(rows, 4 * LANES);
    tile_load<6>(panel, 4 * LANES);
    tile_multiply<S, 4, 6>();
    tile_load<6>(panel + TILE_SIZE, 4 * LANES);
    tile_multiply<S + 1, 4, 6>();
    beside(i);
  }
}

// The same of LoRA's low rows and columns.
template <int S>
inline void add_lora(const bf16* low, const bf16* columns, int64_t steps, int64_t pairs) {
  for (int64_t step = 0; step < steps; ++step, low += TILE_SIZE) {
    tile_load<LOW_ROWS>(low, 4 * LANES);
    each<2>([&](auto n) {
      tile_load<LOW_COLUMNS>(columns, 4 * LANES);
      tile_multiply<S + n, LOW_ROWS, LOW_COLUMNS>();
      columns += pairs * TILE_DEPTH;
    });
  }
}

template <int S>
inline void zero_sums() {
  tile_zero<S>();
  tile_zero<S + 1>();
}

template <int S>
inline void load_sums(const float* sums) {
  tile_load<S>(sums, 4 * LANES);
  tile_load<S + 1>(sums + TILE_ROWS * LANES, 4 * LANES);
}

template <int S>
inline void store_sums(float* sums) {
  tile_store<S>(sums, 4 * LANES);
  tile_store<S + 1>(sums + TILE_ROWS * LANES, 4 * LANES);
}

inline void copy_rows(const LinearCall& call, const Block& block, bf16* to) {
  for (int64_t m = 0; m < TILE_ROWS; ++m) {
    const bf16* row = call.x + (block.from + m) * call.in;
    for (int64_t i = 0; i < call.in; i += TILE_DEPTH)
      _mm512_store_si512(to + i * TILE_ROWS + m * TILE_DEPTH, _mm512_loadu_si512(row + i));
  }
}

// low = rows . a^T, 16 ranks at a time; zero beyond them
inline void shrink_block(const Laid& lora, const bf16* rows, int64_t in, int64_t pairs, bf16* low) {
  alignas(64) float sums[TILE_ROWS][LANES];
  for (int64_t step = 0; step < lora.steps; ++step, low += TILE_SIZE)
    for (int64_t r = 0; r < 2 * pairs; r += LANES) {
      const int64_t rank = step * 2 * pairs + r;
      tile_zero<0>();
      if (rank < lora.ranks)
        for (int64_t i = 0; i < in; i += TILE_DEPTH) {
          tile_load<4>(rows + i * TILE_ROWS, 4 * LANES);
          tile_load<6>(lora.shrink + rank * in + i * LANES, 4 * LANES);
          tile_multiply<0, 4, 6>();
        }
      tile_store<0>(sums, 4 * LANES);
      for (int m = 0; m < TILE_ROWS; ++m) store16(low + m * TILE_DEPTH + r, _mm512_load_ps(sums[m]));
    }
}

// The product of a panel and a block in two tiles; those of the other two, of the block before, are
// stored first, and finished a few rows at a time beside the multiplying.
template <bool ADD, bool GELU>
struct Multiplier {
  const LinearCall& call;
  const Group& group;
  alignas(64) float sums[2][TILE_ROWS][LANES];
  const Block* last = nullptr;  // whose sums are whole
  int64_t last_o = 0, next = 0;  // its outputs, and its next row to be finished
  float* parked = nullptr;  // where sums that are not whole go

  // y = sums + bias and so on
  inline __attribute__((always_inline)) void finish(int64_t rows) {
    if (!last) return;
    for (const int64_t end = rows < last->last ? rows : last->last; next < end; ++next) {
      bf16* to = call.y + (last->from + next) * call.out + last_o;
      __m512 v[2];
      each<2>([&](auto n) {
        v[n] = _mm512_add_ps(_mm512_load_ps(sums[n][next]), _mm512_load_ps(group.bias + last_o + n * LANES));
        if (ADD) v[n] = _mm512_add_ps(v[n], load16(to + n * LANES));
        if (GELU) v[n] = gelu(v[n]);
      });
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
    }
  }

  template <int S>
  void store_last() {
    if (last) store_sums<S>(sums[0][0]);
    if (parked) store_sums<S>(parked);
  }

  template <int S>
  void step(int64_t at, int64_t o, int64_t i, int64_t depth) {
    const Block& block = group.blocks[at];
    store_last<2 - S>();
    if (i == 0)
      zero_sums<S>();
    else
      load_sums<S>(group.so_far(at));
    add_products<S>(group.rows(at) + i * TILE_ROWS, call.panels + o * call.in + i * PANEL_WIDTH, depth,
                    [&](int64_t done) { finish((done + TILE_DEPTH) * TILE_ROWS / depth); });
    const bool whole = i + depth == call.in;
    if (whole && block.lora->steps)
      add_lora<S>(group.lows(at), block.lora->expand + o * block.lora->steps * 2 * group.pairs,
                  block.lora->steps, group.pairs);
    last = whole ? &block : nullptr, last_o = o, next = block.first;
    parked = whole ? nullptr : group.so_far(at);
  }

  void run() {
    const int64_t chunks = (call.in + CHUNK - 1) / CHUNK;
    const int64_t chunk = up((call.in + chunks - 1) / chunks, TILE_DEPTH);
    int64_t steps = 0;
    for (int64_t o = 0; o < call.out; o += PANEL_WIDTH)
      for (int64_t i = 0; i < call.in; i += chunk)
        for (int64_t at = 0; at < group.count; ++at) {
          const int64_t depth = call.in - i < chunk ? call.in - i : chunk;
          if (steps++ % 2)
            step<2>(at, o, i, depth);
          else
            step<0>(at, o, i, depth);
        }
    if (steps % 2)
      store_last<0>();
    else
      store_last<2>();
    finish(TILE_ROWS);
  }
};

inline Scratch& linear_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Not 0: there was no memory.
template <bool ADD, bool GELU>
int run_linear(const LinearCall& call, const Segment* segments, int64_t count) {
  int64_t most_ranks = 0, lora_size = 0;
  for (int64_t s = 0; s < count; ++s)
    if (segments[s].a && segments[s].ranks > most_ranks) most_ranks = segments[s].ranks;
  const Depth depth(most_ranks);
  const auto laid_ranks = [&](const Segment& segment) { return segment.a ? segment.ranks : 0; };
  for (int64_t s = 0; s < count; ++s) {
    const int64_t ranks = laid_ranks(segments[s]);
    lora_size += up(ranks, LANES) * call.in + depth.steps(ranks) * 2 * depth.pairs * call.out;
  }
  const int64_t most_steps = depth.steps(most_ranks);
  const int64_t block_size = TILE_ROWS * (call.in + most_steps * TILE_DEPTH + 2 * PANEL_WIDTH);
  const int64_t laid_bytes = up(count * sizeof(Laid), 64);
  char* room = linear_scratch().of(laid_bytes + 2 * (lora_size + block_size * GROUP_BLOCKS) + 4 * call.out);
  if (!room) return 1;
  Laid* laid = (Laid*)room;
  bf16* next = (bf16*)(room + laid_bytes);
  for (int64_t s = 0; s < count; ++s) {
    const Segment& segment = segments[s];
    const int64_t ranks = laid_ranks(segment), steps = depth.steps(ranks);
    laid[s] = {ranks, steps, next, next + up(ranks, LANES) * call.in};
    next = laid[s].expand + steps * 2 * depth.pairs * call.out;
    if (!ranks) continue;
    lay_panels(segment.a, ranks, LANES, call.in, laid[s].shrink);
    lay_columns(segment.b, ranks, steps, depth.pairs, call.out, laid[s].expand);
  }
  Group group;
  group.in = call.in, group.most_steps = most_steps, group.pairs = depth.pairs;
  group.x = next;
  group.low = group.x + call.in * GROUP_BLOCKS * TILE_ROWS;
  group.sums = (float*)(group.low + most_steps * TILE_SIZE * GROUP_BLOCKS);
  group.bias = group.sums + 2 * LANES * GROUP_BLOCKS * TILE_ROWS;
  for (int64_t o = 0; o < call.out; o += LANES)
    _mm512_store_ps(group.bias + o, call.bias ? load16(call.bias + o) : _mm512_setzero_ps());
  const Tiles tiles(most_ranks ? depth.pairs : TILE_ROWS);
  group.count = 0;
  const auto flush = [&] {
    for (int64_t block = 0; block < group.count; ++block) {
      copy_rows(call, group.blocks[block], (bf16*)group.rows(block));
      shrink_block(*group.blocks[block].lora, group.rows(block), call.in, depth.pairs, group.lows(block));
    }
    Multiplier<ADD, GELU>{call, group}.run();
    group.count = 0;
  };
  for (int64_t s = 0; s < count; ++s)
    for (int64_t n = segments[s].start; n < segments[s].end;) {
      const Block block = next_block(n, segments[s].end, call.rows, laid + s);
      group.blocks[group.count++] = block;
      n = block.from + block.last;
      if (group.count == GROUP_BLOCKS) flush();
    }
  if (group.count) flush();
  return 0;
}

}  // namespace
