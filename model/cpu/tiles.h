// AMX: products of 16 rows of 32 bfloat16 by 32 rows of 16, into 16 rows of 16 float32.
//
// A tile is a register of 16 rows of 64 bytes. Its number is in the instruction, so here it is a
// template's argument. The second factor is laid out in pairs: row p has the elements 2p and 2p + 1
// of each of its 16 columns side by side.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

namespace {

const int TILE_ROWS = 16, TILE_DEPTH = 32;  // of the first factor: rows, and bfloat16 in each
const int TILE_SIZE = TILE_ROWS * TILE_DEPTH;  // bfloat16 of either factor

// Asks the kernel, which saves tiles at a context switch only for who asked; false where it won't.
inline bool tiles_permitted() {
  const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// While it lives this thread's tiles are of 16 rows of 64 bytes; oneDNN sets up its own again. Two are
// for products of less depth: LOW_ROWS of first factors, of `pairs` pairs, LOW_COLUMNS of second ones.
const int LOW_ROWS = 5, LOW_COLUMNS = 7;

struct Tiles {
  struct alignas(64) Shape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  explicit Tiles(int64_t pairs = TILE_ROWS) {
    Shape shape;
    shape.bytes[LOW_ROWS] = 4 * pairs, shape.rows[LOW_COLUMNS] = pairs;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Strides are in bytes.
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// SUM += ROWS . COLUMNS
template <int SUM, int ROWS, int COLUMNS>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(COLUMNS));
}

}  // namespace
