// The shape in which all formats reach the products: rows of 32 bits per column.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

// A format gives readers of a unit (8 depths, see layout.h), for one vector of its columns:
//   Floats  8 rows of one fp32 depth
//   Pairs   4 rows of two bfloat16 depths
//   Quads   2 rows of four depths in "quad order", as unsigned bytes: weight + kOffset
// A reader is made from the place of its columns in the unit's first row. row(i) is called for i =
// 0, 1, ... in turn, so that it may keep what the next row needs.
inline constexpr size_t kRowBytes = 64;

template <size_t kValue>
struct Index {
  static constexpr size_t value = kValue;
};

// fp32 rows out of a reader of pairs.
template <class Isa, class PairReader>
struct FloatsOfPairs {
  explicit FloatsOfPairs(const std::byte* unit) : pairs(unit) {}
  template <size_t kRow>
  typename Isa::Bits row(Index<kRow>) {
    if constexpr (kRow % 2 == 0) {
      pair = pairs.row(Index<kRow / 2>{});
      return Isa::template shift_left32<16>(pair);
    } else {
      return Isa::bit_and(pair, Isa::splat32(-65536));
    }
  }
  PairReader pairs;
  typename Isa::Bits pair;
};

// Rows that need no decoding: `decoded` weights, and formats that are stored as kernels read them.
template <class Isa>
struct StoredRows {
  explicit StoredRows(const std::byte* unit) : unit(unit) {}
  template <size_t kRow>
  typename Isa::Bits row(Index<kRow>) const {
    return Isa::load_bits(unit + kRow * kRowBytes);
  }
  const std::byte* unit;
};

}  // namespace
}  // namespace ktt
