// What an instruction set offers the layer: a table of plain functions over operand rows and packed
// panels (see layout.h). No intrinsics here; with formats.h and layout.h these are the kernel
// headers that the rest may include.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "layout.h"

namespace ktt {

inline constexpr size_t kMaxRows = 256;  // rows of one call, a multiple of every row block
inline constexpr size_t kMaxPanels = 8;  // panels of one call
// Scratch of one call: a chunk of two panels in the widest type that formats are decoded to. Vector
// kernels decode one panel; tile kernels two at once and the next chunk beside, in half the width.
inline constexpr size_t kDecodeBytes = 2 * kChunkDepth * kPanelColumns * sizeof(float);

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };  // of x and out
inline constexpr size_t kNumDtypes = 2;

// What the matrix products multiply: fp32, bfloat16, or int8 with a scale for each group.
enum class Activation : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
inline constexpr size_t kNumActivations = 3;

// An int8 operand row: values, then scales, then the sums of the values, one of each for a group.
//
//   int8  values[round_up(depth, 64)]   in quad order (see layout.h), zeros past the depth
//   float scales[groups]                value * scale is the activation
//   int32 sums[groups]                  for weights that are stored with an offset
struct Int8Row {
  static size_t values_bytes(const Depth& depth) { return (depth.size + 63) / 64 * 64; }
  static size_t scales_offset(const Depth& depth) { return values_bytes(depth); }
  static size_t sums_offset(const Depth& depth) {
    return values_bytes(depth) + depth.num_groups() * sizeof(float);
  }
};

// Some neighbouring panels times a block of rows. Results are independent of how rows and panels
// are cut into calls.
struct BlockTask {
  const void* const* rows;   // operand rows
  size_t row_stride;         // bytes from row to row when they are contiguous, else 0
  size_t num_rows;           // 1..kMaxRows
  const std::byte* weights;  // the first panel
  size_t panel_bytes;        // from panel to panel
  const std::byte* scales;   // of the first panel, see layout.h; null for kBf16
  size_t panel_scale_bytes;  // from panel to panel
  size_t num_panels;         // 1..kMaxPanels
  Depth depth;
  float* sums;        // out: [num_panels][num_rows][kPanelColumns]
  std::byte* decode;  // kDecodeBytes of scratch, 64-byte aligned
};

// How activations of one mode become operands and how panels use them.
struct ActivationKernels {
  size_t min_tile_rows;  // from so many rows on contiguous ones are worth copying them
  size_t num_panels;     // panels of a call that suit `multiply`, at most kMaxPanels
  // Bytes of an operand row, what keeps neighbours out of each other's cache sets included.
  size_t (*row_bytes)(const Depth& depth);
  void (*multiply[kNumFormats])(const BlockTask& task);  // null: not offered in this mode
  // depth.size elements of a dtype to an operand row.
  void (*convert[kNumDtypes])(const void* source, const Depth& depth, void* operands);
  // silu(gate) * up for the sums of one gate/up panel: kTileColumns values for each row, in
  // operands, or in fp32 when `quantizes`: convert[kFloat32] makes whole rows of it afterwards.
  void (*swiglu)(const float* sums, size_t num_rows, void* values, size_t row_stride_bytes);
  size_t value_bytes;  // of one value that swiglu writes
  bool quantizes;
};

struct KernelTable {
  const char* name;
  ActivationKernels activation[kNumActivations];
  // totals[row_of[r]] += weights[r] * sums[r], rows of kPanelColumns.
  void (*accumulate)(const float* sums, const float* weights, const uint32_t* row_of,
                     size_t num_rows, float* totals);
  // kPanelColumns values of fp32 to the caller's type, in place of what is there or added to it.
  void (*finish[kNumDtypes])(const float* totals, void* out);
  void (*finish_add[kNumDtypes])(const float* totals, void* out);
  // Around every stretch of kernel calls of a thread; `leave` takes what `enter` returned.
  uint32_t (*enter)();
  void (*leave)(uint32_t state);
};

const KernelTable& table_avx2_base();
const KernelTable& table_avx2_vnni();
const KernelTable& table_avx512_base();
const KernelTable& table_avx512_vnni();
const KernelTable& table_avx512_bf16();
const KernelTable& table_amx();

}  // namespace ktt
