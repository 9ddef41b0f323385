// AMX: tiles for many rows, and a vector kernel for few rows that adds in the very order of the
// tile multiply, so that a row's sums do not depend on which of the two computed it.
//
// The tile multiply TDPBF16PS takes 32 of depth: it sums the even and the odd products of each
// column apart, adds the two sums, and adds that to the accumulator.
//
//   accumulators   tile 0 | tile 1     rows  0-15 of the block
//   (16 x 16 fp32) tile 2 | tile 3     rows 16-31
//   operands       tile 4: rows 0-15, tile 5: rows 16-31 of A (16 rows x 32 depths)
//   weights        tile 6: columns 0-15, tile 7: columns 16-31 (16 pairs of depth x 16 columns)
#pragma once

#include <cstddef>
#include <cstdint>

#include "amx_tiles.h"
#include "gemm.h"
#include "isa_avx512.h"

namespace ktt {
namespace {

struct IsaAmx : IsaAvx512 {
  static constexpr size_t kMaxRows = 4;     // three registers for each sum, see TileOrderDot
  static constexpr size_t kSegment = 2048;  // longer: sums stay in their tiles meanwhile
};

inline constexpr size_t kTileRows = 16;
inline constexpr size_t kBlockRows = 2 * kTileRows;
inline constexpr size_t kMinTileRows = 4;

// Few rows: the tile multiply's arithmetic in vectors.
struct TileOrderDot {
  using Isa = IsaAmx;
  static constexpr size_t kMaxRows = Isa::kMaxRows;

  template <class Format, size_t kRows>
  static void run(const Segment<typename Format::Storage>& s) {
    constexpr size_t kVectors = kPanelColumns / Isa::kLanes;
    typename Isa::F32 part[kRows][kVectors];
    for (auto& row : part) {
      for (auto& v : row) v = Isa::zero();
    }
    const auto* w = s.weights;
    for (size_t step = 0; step < s.num_steps; ++step, w += kStepElements) {
      add_step<Format>(s, step, w, part);
    }
    fold<Isa>(part, s.scales, s.sums);
  }

  template <class Format, size_t kRows, size_t kVectors>
  static inline void add_step(const Segment<typename Format::Storage>& s, size_t step,
                              const typename Format::Storage* w,
                              typename Isa::F32 (&part)[kRows][kVectors]) {
    typename Isa::F32 even[kRows][kVectors];
    typename Isa::F32 odd[kRows][kVectors];
    for (size_t pair = 0; pair < kStepDepth / 2; ++pair) {
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        const auto* at = w + pair_offset(v, Isa::kLanes, pair);
        _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchElements), _MM_HINT_T0);
        const auto pairs = Format::template load<Isa>(at);
#pragma GCC unroll 16
        for (size_t r = 0; r < kRows; ++r) {
          const auto* a = static_cast<const uint16_t*>(s.rows[r]) + s.begin + step * kStepDepth;
          const auto both = Isa::splat_pair(a + 2 * pair);
          if (pair == 0) even[r][v] = odd[r][v] = Isa::zero();
          even[r][v] = Isa::fma(Isa::even(pairs), Isa::even(both), even[r][v]);
          odd[r][v] = Isa::fma(Isa::odd(pairs), Isa::odd(both), odd[r][v]);
        }
      }
    }
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t v = 0; v < kVectors; ++v) {
        part[r][v] = Isa::add(part[r][v], Isa::add(even[r][v], odd[r][v]));
      }
    }
  }
};

// sums = sums + scale * part for rows that tiles left in memory.
inline void fold_rows(const float* part, size_t num_rows, const float* scales, float* sums) {
  for (size_t r = 0; r < num_rows; ++r) {
    IsaAmx::F32 row[1][2];
    for (size_t v = 0; v < 2; ++v) {
      row[0][v] = IsaAmx::load(part + r * kPanelColumns + v * IsaAmx::kLanes);
    }
    fold<IsaAmx>(row, scales, sums + r * kPanelColumns);
  }
}

inline void multiply_one_tile_row(const char* a, size_t stride, const Segment<uint16_t>& s,
                                  float* part) {
  const uint16_t* w = s.weights;
  tiles::zero<0>();
  tiles::zero<1>();
  for (size_t step = 0; step < s.num_steps; ++step, w += kStepElements) {
    tiles::load<4>(a + step * kStepDepth * sizeof(uint16_t), stride);
    tiles::load<6>(w, kTileBytesPerRow);
    tiles::load<7>(w + kStepElements / 2, kTileBytesPerRow);
    tiles::multiply<0, 4, 6>();
    tiles::multiply<1, 4, 7>();
  }
  tiles::store<0>(part, kPanelColumns * sizeof(float));
  tiles::store<1>(part + kTileColumns, kPanelColumns * sizeof(float));
}

inline void multiply_two_tile_rows(const char* a, size_t stride, const Segment<uint16_t>& s,
                                   float* part) {
  const uint16_t* w = s.weights;
  tiles::zero<0>();
  tiles::zero<1>();
  tiles::zero<2>();
  tiles::zero<3>();
  for (size_t step = 0; step < s.num_steps; ++step, w += kStepElements) {
    const char* a_step = a + step * kStepDepth * sizeof(uint16_t);
    tiles::load<6>(w, kTileBytesPerRow);
    tiles::load<7>(w + kStepElements / 2, kTileBytesPerRow);
    tiles::load<4>(a_step, stride);
    tiles::load<5>(a_step + kTileRows * stride, stride);
    tiles::multiply<0, 4, 6>();
    tiles::multiply<1, 4, 7>();
    tiles::multiply<2, 5, 6>();
    tiles::multiply<3, 5, 7>();
  }
  constexpr size_t kStride = kPanelColumns * sizeof(float);
  tiles::store<0>(part, kStride);
  tiles::store<1>(part + kTileColumns, kStride);
  tiles::store<2>(part + kTileRows * kPanelColumns, kStride);
  tiles::store<3>(part + kTileRows * kPanelColumns + kTileColumns, kStride);
}

// Many rows. The last block reads up to kRowPadding rows more than there are; each row of a tile
// is a sum of its own, so what they hold does not matter.
inline void multiply_tiles(size_t num_rows, const Segment<uint16_t>& s) {
  alignas(64) float part[kBlockRows * kPanelColumns];
  const char* a = static_cast<const char*>(s.rows[0]) + s.begin * sizeof(uint16_t);
  for (size_t r = 0; r < num_rows; r += kBlockRows) {
    const size_t left = num_rows - r;
    if (left > kTileRows) {
      multiply_two_tile_rows(a + r * s.row_stride, s.row_stride, s, part);
    } else {
      multiply_one_tile_row(a + r * s.row_stride, s.row_stride, s, part);
    }
    fold_rows(part, left < kBlockRows ? left : kBlockRows, s.scales, s.sums + r * kPanelColumns);
  }
}

struct TileRows {
  using Isa = IsaAmx;

  template <class Format>
  static void run(const PanelTask& task, const Segment<typename Format::Storage>& segment) {
    if (task.row_stride == 0 || task.num_rows < kMinTileRows) {
      VectorRows<TileOrderDot>::run<Format>(task, segment);
    } else if constexpr (Format::kDecodes) {
      multiply_tiles(task.num_rows, decoded<Isa, Format>(segment, task.decode));
    } else {
      multiply_tiles(task.num_rows, segment);
    }
  }
};

}  // namespace
}  // namespace ktt
