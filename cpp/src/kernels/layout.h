// How weights lie in memory, the same for every instruction set: packing, unpacking, sizes.
//
// A matrix [columns, depth] (a row of a checkpoint's matrix is a column here) is packed in panels
// of 32 columns: two tiles of 16. In the gate/up matrix tile 0 holds 16 columns of gate and tile 1
// the same 16 of up, so that one panel's result is all that the activation function needs. A panel
// runs over the whole depth in chunks of 128:
//
//   panel: chunk 0 [tile 0 | tile 1], chunk 1 [tile 0 | tile 1], ...
//
// Chunks start at multiples of 128 of the uncut matrix, so the first and the last may be short (a
// multiple of 32). A tile's part of a chunk is a row of units: 8 depths (0-7 below) x 16 columns.
//
//   bf16  four rows of 64 bytes, row p: for each of 16 columns depths 2p, 2p + 1
//   fp8   two rows of 64 bytes, row q in four lanes l of 16 bytes:
//         for columns 4l..4l+3 depths 4q, 4q + 1, then for the same columns depths 4q + 2, 4q + 3
//   int8  two rows of 64 bytes, row q: for each of 16 columns depths 4q, 4q + 2, 4q + 1, 4q + 3
//   int4  one row of 64 bytes: low bits as int8's row 0, high bits as its row 1
//
// bf16 pairs and int8 quads are what the tile and dot-product instructions read. fp8 interleaves
// the two bytes of decoded values within lanes. The "quad order" 0 2 1 3 lets both halves of a
// 16-bit lane be shifted to pairs of depths; int8 activations are laid in the same order.
//
// Scales of a panel: fp8: fp32 [blocks][2 tiles]; int8, int4: bfloat16 [groups][32 columns].
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ktt {

inline constexpr size_t kPanelColumns = 32;
inline constexpr size_t kTileColumns = 16;
inline constexpr size_t kUnitDepth = 8;
inline constexpr size_t kStepDepth = 32;    // every depth and every cut is a multiple
inline constexpr size_t kChunkDepth = 128;  // also the side of an fp8 scale's square

// A slice of a matrix's depth: `size` from `begin`, with one scale for `group` neighbours; groups
// start at multiples of `group` of the uncut depth. Without scales `group` is kChunkDepth.
struct Depth {
  size_t size;
  size_t begin;
  size_t group;  // 32, 64 or 128

  size_t first_chunk() const { return kChunkDepth - begin % kChunkDepth; }
  size_t first_group() const { return group - begin % group; }
  size_t num_groups() const {
    return size == 0 ? 0 : (begin + size + group - 1) / group - begin / group;
  }
};

// Two times 16 rows of row-major matrices as a checkpoint has them, from the depth's begin on.
struct PanelSource {
  const void* tile[2];  // need no alignment
  size_t row_bytes;     // from row to row
};
struct PanelTarget {
  void* tile[2];
  size_t row_bytes;
};

size_t panel_bytes(WeightFormat format, size_t depth);
void pack_panel(WeightFormat format, const PanelSource& source, const Depth& depth, void* panel);
void unpack_panel(WeightFormat format, const void* panel, const Depth& depth,
                  const PanelTarget& target);

// The same for a panel's scales, from that of the depth's begin on; a square's scale is one row for
// a whole tile. The source may have coarser groups than the depth, `source_group` weights each;
// then a scale stands several times. Of a group cut in two only the half where it begins is
// unpacked.
size_t panel_scale_bytes(WeightFormat format, const Depth& depth);
void pack_scales(WeightFormat format, const PanelSource& source, const Depth& depth,
                 size_t source_group, void* panel);
void unpack_scales(WeightFormat format, const void* panel, const Depth& depth, size_t target_group,
                   const PanelTarget& target);

// Rows of scales that a tile has.
constexpr size_t scale_rows(WeightFormat format) {
  return traits(format).scales == Scales::kGroups ? kTileColumns : 1;
}

}  // namespace ktt
