// All layers of a part with AMX, in one call: Python's lock is not needed from layer to layer.

#pragma once

#include "attention.h"
#include "linear.h"
#include "norm.h"

namespace {

// The trunk; model/stack.py has the same structure.
struct Trunk {
  int64_t layers, width, heads, head_dim;
  const float *cos, *sin;    // (positions, head_dim / 2)
  const int64_t* matrices;   // (layers, 4, 2): panels and bias (0: none) of each layer's linears
};

// Some sequences, end to end, and the adapters of their tokens.
struct Part {
  int64_t tokens, real;  // those from `real` on mean nothing
  int64_t rows;
  const int64_t *row_starts, *row_lengths;
  int64_t segments;
  const int64_t *starts, *ends;  // of each segment
  const int64_t* norms;          // (2 layers + 1, segments, 2): weight and bias (0: none)
  const int64_t* lora;           // (layers, 4, 3, segments): a (0: none), b and rank
  const int64_t* kept;           // (layers + 1,): where the state after ln_f, after layer 1, ... goes, or 0
};

inline void norm_part(const Trunk& trunk, const Part& part, int64_t which, const bf16* x, bf16* y, float eps) {
  const int64_t* pairs = part.norms + which * part.segments * 2;
  for (int64_t s = 0; s < part.segments; ++s)
    for (int64_t n = part.starts[s]; n < part.ends[s]; ++n)
      norm_row(x + n * trunk.width, (const bf16*)pairs[2 * s], (const bf16*)pairs[2 * s + 1],
               y + n * trunk.width, trunk.width, eps);
}

// Linear `site` (0 to 3) of a layer with its LoRA. Not 0: there was no memory.
template <bool ADD, bool GELU>
int linear_part(const Trunk& trunk, const Part& part, int64_t layer, int64_t site, const bf16* x, int64_t in,
                bf16* y, int64_t out, Segment* segments) {
  const int64_t* matrix = trunk.matrices + (layer * 4 + site) * 2;
  const int64_t* lora = part.lora + (layer * 4 + site) * 3 * part.segments;
  for (int64_t s = 0; s < part.segments; ++s)
    segments[s] = {part.starts[s], part.ends[s], (const bf16*)lora[s], (const bf16*)lora[part.segments + s],
                   lora[2 * part.segments + s]};
  const LinearCall call = {x, part.tokens, in, out, (const bf16*)matrix[0], (const bf16*)matrix[1], y};
  return run_linear<ADD, GELU>(call, segments, part.segments);
}

// x (tokens, width) is changed in place. `steps` grows with every layer. Not 0: there was no memory.
template <int D>
int run_stack(const Trunk& trunk, const Part& part, bf16* x, float eps, int64_t* steps) {
  static thread_local Scratch memory;
  const int64_t width = trunk.width, size = part.tokens * width;
  char* room = memory.of(6 * size * sizeof(bf16) + part.segments * sizeof(Segment));
  if (!room) return 1;
  bf16 *normed = (bf16*)room, *y = normed + size, *wide = y + size;  // wide: (tokens, 4 width)
  Segment* segments = (Segment*)(wide + 4 * size);
  memset(y, 0, size * sizeof(bf16));  // of tokens that mean nothing
  for (int64_t layer = 0; layer < trunk.layers; ++layer) {
    norm_part(trunk, part, 2 * layer, x, normed, eps);
    if (linear_part<false, false>(trunk, part, layer, 0, normed, width, wide, 3 * width, segments) ||
        attention_of<D>(wide, trunk.cos, trunk.sin, part.row_starts, part.row_lengths, part.rows, trunk.heads,
                        true, y) ||
        linear_part<true, false>(trunk, part, layer, 1, y, width, x, width, segments))
      return 1;
    norm_part(trunk, part, 2 * layer + 1, x, normed, eps);
    if (linear_part<false, true>(trunk, part, layer, 2, normed, width, wide, 4 * width, segments) ||
        linear_part<true, false>(trunk, part, layer, 3, wide, 4 * width, x, width, segments))
      return 1;
    if (part.kept[layer + 1]) memcpy((void*)part.kept[layer + 1], x, part.real * width * sizeof(bf16));
    __atomic_fetch_add(steps, 1, __ATOMIC_RELAXED);  // of several threads
  }
  if (part.kept[0]) {
    norm_part(trunk, part, 2 * trunk.layers, x, normed, eps);
    memcpy((void*)part.kept[0], normed, part.real * width * sizeof(bf16));
  }
  return 0;
}

}  // namespace
