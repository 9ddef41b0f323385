// What an instruction set offers the layer: a table of plain functions, and the packed layout that
// all of them read. No intrinsics here; this is the only kernel header the rest may include,
// together with formats.h.
//
// A weight matrix [columns, depth] is packed in panels of 32 columns. A panel runs over the whole
// depth in steps of 32; a step is two tiles of 16 columns, each in the order the AMX tile multiply
// reads, which suits vector code as well (one 16-column row of pairs is one 512-bit register):
//
//   panel: step 0 [tile 0 | tile 1], step 1 [tile 0 | tile 1], ...
//   tile:  16 rows (pairs of depth) x 16 columns x 2 (even depth, odd depth)
//
// In the gate/up matrix tile 0 holds 16 columns of gate and tile 1 the same 16 columns of up, so
// one panel's result is all that the activation function needs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ktt {

inline constexpr size_t kPanelColumns = 32;
inline constexpr size_t kTileColumns = 16;
inline constexpr size_t kStepDepth = 32;
inline constexpr size_t kStepElements = kPanelColumns * kStepDepth;
inline constexpr size_t kMaxPanelRows = 128;  // rows of one call, a multiple of every row block
inline constexpr size_t kRowPadding = 32;     // rows that tile kernels may read past the last one
inline constexpr size_t kDecodeElements = 4 * kStepElements;  // one scale block of a panel

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

inline constexpr size_t kNumDtypes = 2;

// One panel times a block of rows. Results are independent of how rows are cut into calls.
struct PanelTask {
  const void* const* rows;  // operand rows of `depth` elements
  size_t row_stride;        // bytes from row to row when they are contiguous and padded, else 0
  size_t num_rows;          // 1..kMaxPanelRows
  const void* weights;      // the packed panel
  const float* scales;      // [scale blocks along the depth][2 tiles], or null
  size_t depth;             // a multiple of kStepDepth
  size_t first_block;       // depth of the first scale block (a cut may leave it short)
  float* sums;              // out: [num_rows][kPanelColumns]
  uint16_t* decode;         // kDecodeElements of scratch
};

// How activations of one mode become operands and how panels use them.
struct ActivationKernels {
  size_t operand_bytes;  // of one element
  size_t min_tile_rows;  // from so many rows on `panel` uses tiles, if the rows are contiguous
  void (*panel[kNumFormats])(const PanelTask& task);
  // `count` elements, a multiple of 16, to operands; null when that type already is one.
  void (*convert[kNumDtypes])(const void* source, size_t count, void* operands);
  // silu(gate) * up for the sums of gate/up panels: 16 operands for each row.
  void (*swiglu)(const float* sums, size_t num_rows, void* operands, size_t row_stride_bytes);
};

struct KernelTable {
  const char* name;
  ActivationKernels activation[kNumDtypes];
  // totals[row_of[r]] += weights[r] * sums[r], rows of kPanelColumns.
  void (*accumulate)(const float* sums, const float* weights, const uint32_t* row_of,
                     size_t num_rows, float* totals);
  // kPanelColumns values of fp32 to the caller's type.
  void (*finish[kNumDtypes])(const float* totals, void* out);
  // Around every stretch of kernel calls of a thread; `leave` takes what `enter` returned.
  uint32_t (*enter)();
  void (*leave)(uint32_t state);
};

const KernelTable& table_avx2();
const KernelTable& table_avx512();
const KernelTable& table_avx512_bf16();
const KernelTable& table_amx();

}  // namespace ktt
