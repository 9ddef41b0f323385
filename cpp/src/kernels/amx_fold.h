// What follows a span of tile multiplies: its sums, which tiles left in memory, are scaled and
// added to the totals. A few rows at a time, to be done while tiles compute the next span.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "amx_stage.h"

namespace ktt {
namespace {

// Two groups at once halve the loads and stores of the totals.
inline constexpr size_t kSpanGroups = 2;

struct Span {
  const float* sums;  // [groups][kTileRows][columns], the bits of int32 for QuadTiles
  const StageGroup* groups;
  size_t num_groups;        // 1..kSpanGroups
  const void* const* rows;  // operand rows
  size_t row_scales;        // where in a row the first group's scale is
  float* totals;            // of the first row and panel
  size_t panel_stride;      // of totals
  size_t num_rows;
  bool is_first;  // totals hold nothing yet
};

template <class Tiles, size_t kPanels>
class Fold {
 public:
  static constexpr size_t kColumns = kPanels * kPanelColumns;
  static constexpr size_t kGroupFloats = kTileRows * kColumns;

  void begin(const Span& span) {
    span_ = span;
    row_ = 0;
  }

  size_t rows_left() const { return span_.num_rows - row_; }

  void advance(size_t num_rows) {
    const size_t end = num_rows < rows_left() ? row_ + num_rows : span_.num_rows;
    if (span_.num_groups == kSpanGroups) {
      add_rows<kSpanGroups>(end);
    } else {
      add_rows<1>(end);
    }
  }

 private:
  static constexpr size_t kVectors = kColumns / kTileColumns;

  template <size_t kGroups>
  void add_rows(size_t end) {
    for (; row_ < end; ++row_) {
      __m512 row_scale[kGroups];
      for (size_t g = 0; g < kGroups; ++g) row_scale[g] = scale_of_row(g);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        float* total = span_.totals + v / kTilesOfPanel * span_.panel_stride +
                       row_ * kPanelColumns + v % kTilesOfPanel * kTileColumns;
        const __mmask16 is_there = span_.is_first ? 0 : 0xFFFF;
        __m512 sum = _mm512_maskz_loadu_ps(is_there, total);
#pragma GCC unroll 2
        for (size_t g = 0; g < kGroups; ++g) {
          const float* part = span_.sums + g * kGroupFloats + row_ * kColumns + v * kTileColumns;
          sum = _mm512_fmadd_ps(Tiles::sums(part), scale(g, v, row_scale[g]), sum);
        }
        _mm512_storeu_ps(total, sum);
      }
    }
  }

  __m512 scale_of_row(size_t group) const {
    if constexpr (!Tiles::kRowScales) return _mm512_set1_ps(1.0f);
    float scale;
    const auto* row = static_cast<const std::byte*>(span_.rows[row_]);
    __builtin_memcpy(&scale, row + span_.row_scales + group * sizeof(float), sizeof(scale));
    return _mm512_set1_ps(scale);
  }

  __m512 scale(size_t group, size_t vector, __m512 row_scale) const {
    const __m512 scale = _mm512_load_ps(span_.groups[group].scales + vector * kTileColumns);
    return Tiles::kRowScales ? _mm512_mul_ps(scale, row_scale) : scale;
  }

  Span span_{};
  size_t row_ = 0;
};

}  // namespace
}  // namespace ktt
