// The serving forward on CPUs with AVX-512's bfloat16 arithmetic: LayerNorm, GELU, attention with
// rotary positions, LoRA's two thin products and 8-bit layers; with AMX all layers in one call.
//
// Called through model/kernels.py and model/stack.py, which check shapes and say what each argument
// is; equal to model/layers.py up to rounding, which the tests hold it against. Everything is read
// and written as bfloat16 and computed in float32, rounded once at the end. Arrays are row-major. No
// function keeps state but scratch of a thread's own, so that threads may call them side by side.
// Built without GCC's partial redundancy elimination, which writes sums that are in registers to
// memory too (int8: half the speed).

#include "attention.h"
#include "int8.h"
#include "lora.h"
#include "norm.h"
#include "stack.h"

#define API extern "C" __attribute__((visibility("default")))

// The version of what these functions are passed; model/kernels.py has the same number.
API int trunkline_layout() { return 1; }

// Whether the kernel lets this process use AMX; on a processor that has it, before it is used.
API int trunkline_permit_tiles() { return tiles_permitted(); }

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
// by cos, sin (positions, D / 2) float32. `tiles`: with AMX. Not 0: there was no memory, or D is not
// 32, 64 or 128.
API int trunkline_attention(const bf16* qkv, const float* cos, const float* sin, const int64_t* starts,
                            const int64_t* lengths, int64_t rows, int64_t heads, int64_t head_dim,
                            int tiles, bf16* out) {
  switch (head_dim) {
    case 32: return attention_of<32>(qkv, cos, sin, starts, lengths, rows, heads, tiles, out);
    case 64: return attention_of<64>(qkv, cos, sin, starts, lengths, rows, heads, tiles, out);
    case 128: return attention_of<128>(qkv, cos, sin, starts, lengths, rows, heads, tiles, out);
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

// w (out, in) as trunkline_stack takes it; in and out multiples of 32.
API void trunkline_lay_panels(const bf16* w, int64_t in, int64_t out, bf16* panels) {
  lay_panels(w, out, PANEL_WIDTH, in, panels);
}

// x (tokens, width) through all layers of the trunk, in place, with AMX; see stack.h. Not 0: there was
// no memory, or the heads' width is not 32, 64 or 128.
API int trunkline_stack(const Trunk* trunk, const Part* part, bf16* x, float eps, int64_t* steps) {
  switch (trunk->head_dim) {
    case 32: return run_stack<32>(*trunk, *part, x, eps, steps);
    case 64: return run_stack<64>(*trunk, *part, x, eps, steps);
    case 128: return run_stack<128>(*trunk, *part, x, eps, steps);
    default: return 1;
  }
}
