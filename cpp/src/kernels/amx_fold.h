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
    if (rows_left() == 0) return;
    const size_t end = num_rows < rows_left() ? row_ + num_rows : span_.num_rows;
    if (span_.num_groups == kSpanGroups) {
      add_rows<kSpanGroups>(span_, row_, end);
    } else {
      add_rows<1>(span_, row_, end);
    }
    row_ = end;
  }

 private:
  static constexpr size_t kVectors = kColumns / kTileColumns;

  // By value: what is stored to totals could otherwise be the span itself.
  template <size_t kGroups>
  static inline void add_rows(const Span span, size_t row, size_t end) {
    __m512 scales[kGroups][kVectors];
#pragma GCC unroll 2
    for (size_t g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        scales[g][v] = _mm512_load_ps(span.groups[g].scales + v * kTileColumns);
      }
    }
    for (; row < end; ++row) {
      __m512 row_scales[kGroups];
#pragma GCC unroll 2
      for (size_t g = 0; g < kGroups; ++g) row_scales[g] = row_scale(span, row, g);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        float* total = span.totals + v / kTilesOfPanel * span.panel_stride + row * kPanelColumns +
                       v % kTilesOfPanel * kTileColumns;
        __m512 sum = _mm512_loadu_ps(total);
#pragma GCC unroll 2
        for (size_t g = 0; g < kGroups; ++g) {
          const float* part = span.sums + g * kGroupFloats + row * kColumns + v * kTileColumns;
          sum = _mm512_fmadd_ps(Tiles::sums(part), product(scales[g][v], row_scales[g]), sum);
        }
        _mm512_storeu_ps(total, sum);
      }
    }
  }

  static inline __m512 row_scale(const Span& span, size_t row, size_t group) {
    if constexpr (!Tiles::kRowScales) return _mm512_setzero_ps();  // not looked at
    float scale;
    const auto* operands = static_cast<const std::byte*>(span.rows[row]);
    __builtin_memcpy(&scale, operands + span.row_scales + group * sizeof(float), sizeof(scale));
    return _mm512_set1_ps(scale);
  }

  static inline __m512 product(__m512 scale, __m512 row_scale) {
    return Tiles::kRowScales ? _mm512_mul_ps(scale, row_scale) : scale;
  }

  Span span_{};
  size_t row_ = 0;
};

}  // namespace
}  // namespace ktt
