// The driver, written once over two axes: Isa (vector vocabulary) and Format (how packed weights
// become bfloat16 pairs). Each table_*.cpp compiles it with its own flags.
//
// A panel's depth is walked in segments: the scale blocks of a scaled format, else what fits the
// first cache. Each segment's weights meet all rows before the next one is touched, so weights
// come from memory once, and a format that decodes does so once for many rows. A row's sums depend
// on the segments only, never on the rows it is computed with.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "format_bf16.h"
#include "format_fp8.h"
#include "kernel_table.h"

namespace ktt {
namespace {

constexpr size_t kPrefetchElements = 2 * kStepElements;

// One segment of a panel and the rows it meets.
template <class Storage>
struct Segment {
  const void* const* rows;
  size_t row_stride;
  size_t begin;  // first depth, in elements of a row
  size_t num_steps;
  const Storage* weights;
  const float* scales;  // [2 tiles]
  float* sums;          // [rows][kPanelColumns]
};

constexpr size_t tile_of(size_t vector, size_t lanes) { return vector * lanes / kTileColumns; }

// Where vector `vector` of the pair of depths `pair` starts within a step.
constexpr size_t pair_offset(size_t vector, size_t lanes, size_t pair) {
  return tile_of(vector, lanes) * (kStepElements / 2) + pair * 2 * kTileColumns +
         vector * lanes % kTileColumns * 2;
}

// sums = sums + scale * segment, for kRows rows whose segment is in registers.
template <class Isa, size_t kRows, size_t kVectors>
inline void fold(const typename Isa::F32 (&part)[kRows][kVectors], const float* scales,
                 float* sums) {
#pragma GCC unroll 16
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      float* at = sums + r * kPanelColumns + v * Isa::kLanes;
      const auto scale = Isa::splat(scales[tile_of(v, Isa::kLanes)]);
      Isa::store(at, Isa::fma(scale, part[r][v], Isa::load(at)));
    }
  }
}

// Operands in fp32, weights widened: exact products, available everywhere.
template <class Isa>
struct FloatProducts {
  using Operand = float;
  static inline typename Isa::F32 add(typename Isa::F32 sum, typename Isa::Pairs weights,
                                      const Operand* pair) {
    sum = Isa::fma(Isa::even(weights), Isa::splat(pair[0]), sum);
    return Isa::fma(Isa::odd(weights), Isa::splat(pair[1]), sum);
  }
};

// Operands in bfloat16, two products with one instruction.
template <class Isa>
struct PairProducts {
  using Operand = uint16_t;
  static inline typename Isa::F32 add(typename Isa::F32 sum, typename Isa::Pairs weights,
                                      const Operand* pair) {
    return Isa::dot_pairs(sum, weights, Isa::splat_pair(pair));
  }
};

// kRows rows times one segment, sums in registers throughout.
template <class Isa_, template <class> class Products>
struct VectorDot {
  using Isa = Isa_;
  using Operand = typename Products<Isa>::Operand;
  static constexpr size_t kMaxRows = Isa::kMaxRows;

  template <class Format, size_t kRows>
  static void run(const Segment<typename Format::Storage>& s) {
    constexpr size_t kVectors = kPanelColumns / Isa::kLanes;
    const Operand* a[kRows];
    for (size_t r = 0; r < kRows; ++r) a[r] = static_cast<const Operand*>(s.rows[r]) + s.begin;
    typename Isa::F32 part[kRows][kVectors];
    for (auto& row : part) {
      for (auto& v : row) v = Isa::zero();
    }
    const auto* w = s.weights;
    for (size_t depth = 0; depth < s.num_steps * kStepDepth; depth += kStepDepth) {
      for (size_t pair = 0; pair < kStepDepth / 2; ++pair) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          const auto* at = w + pair_offset(v, Isa::kLanes, pair);
          _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchElements), _MM_HINT_T0);
          const auto weights = Format::template load<Isa>(at);
#pragma GCC unroll 16
          for (size_t r = 0; r < kRows; ++r) {
            part[r][v] = Products<Isa>::add(part[r][v], weights, a[r] + depth + 2 * pair);
          }
        }
      }
      w += kStepElements;
    }
    fold<Isa>(part, s.scales, s.sums);
  }
};

template <class Isa>
using FloatDot = VectorDot<Isa, FloatProducts>;
template <class Isa>
using PairDot = VectorDot<Isa, PairProducts>;

// Calls the kernel that was compiled for just so many rows.
template <class Dot, class Format, size_t kRows = Dot::kMaxRows>
inline void run_rows(size_t num_rows, const Segment<typename Format::Storage>& segment) {
  if (num_rows == kRows) {
    Dot::template run<Format, kRows>(segment);
  } else if constexpr (kRows > 1) {
    run_rows<Dot, Format, kRows - 1>(num_rows, segment);
  }
}

template <class Dot, class Format>
inline void run_all_rows(size_t num_rows, Segment<typename Format::Storage> segment) {
  while (num_rows > 0) {
    const size_t now = num_rows < Dot::kMaxRows ? num_rows : Dot::kMaxRows;
    run_rows<Dot, Format>(now, segment);
    num_rows -= now;
    segment.rows += now;
    segment.sums += now * kPanelColumns;
  }
}

// The segment's weights as bfloat16 in `decode`, in the same order.
template <class Isa, class Format>
inline Segment<uint16_t> decoded(const Segment<typename Format::Storage>& s, uint16_t* decode) {
  for (size_t i = 0; i < s.num_steps * kStepElements; i += 2 * Isa::kLanes) {
    Isa::store_pairs(decode + i, Format::template load<Isa>(s.weights + i));
  }
  return {s.rows, s.row_stride, s.begin, s.num_steps, decode, s.scales, s.sums};
}

// Vector code's way through one segment; a tile kernel brings its own.
template <class Dot>
struct VectorRows {
  using Isa = typename Dot::Isa;

  template <class Format>
  static void run(const PanelTask& task, const Segment<typename Format::Storage>& segment) {
    if (Format::kDecodes && task.num_rows > Dot::kMaxRows) {
      run_all_rows<Dot, FormatBf16>(task.num_rows, decoded<Isa, Format>(segment, task.decode));
    } else {
      run_all_rows<Dot, Format>(task.num_rows, segment);
    }
  }
};

template <class Rows, class Format>
void panel(const PanelTask& task) {
  using Isa = typename Rows::Isa;
  constexpr bool kScaled = Format::kScaleBlock != 0;
  static constexpr float kUnscaled[2] = {1.0f, 1.0f};
  for (size_t i = 0; i < task.num_rows * kPanelColumns; i += Isa::kLanes) {
    Isa::store(task.sums + i, Isa::zero());
  }
  const float* scales = kScaled ? task.scales : kUnscaled;
  const auto* weights = static_cast<const typename Format::Storage*>(task.weights);
  size_t length = kScaled ? task.first_block : Isa::kSegment;
  for (size_t begin = 0; begin < task.depth; begin += length) {
    if (kScaled && begin > 0) length = Format::kScaleBlock;
    const size_t now = length < task.depth - begin ? length : task.depth - begin;
    Rows::template run<Format>(task, {task.rows, task.row_stride, begin, now / kStepDepth,
                                      weights + begin * kPanelColumns, scales, task.sums});
    if (kScaled) scales += 2;
  }
}

}  // namespace
}  // namespace ktt
