// What a kernel multiplies and adds with: the three modes of activations, and for int8 the ways of
// instruction sets with and without the four-byte dot product. Each takes weights in rows (rows.h)
// and broadcasts 32 bits of an operand row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"
#include "rows.h"

namespace ktt {
namespace {

// Where an int8 operand row has its scales and sums, in bytes.
struct RowOffsets {
  size_t scales;
  size_t sums;
};

template <class T>
inline T read(const std::byte* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

// Operands in fp32: exact products, available everywhere.
template <class Isa_>
struct FloatProducts {
  using Isa = Isa_;
  using Sum = typename Isa::F32;
  using Partial = Sum;
  using Weights = typename Isa::F32;
  using Operand = typename Isa::F32;
  template <class Format>
  using Reader = typename Format::template Floats<Isa>;
  static constexpr size_t kDepths = 1;  // of a row
  static constexpr size_t kSums = Isa::kSums;
  static constexpr size_t kTilesAtOnce = Isa::kTilesAtOnce;
  static constexpr bool kCallsBlocks = false;
  static constexpr size_t kStreamRows = 0;  // one tile's sums are too few, each waits for itself
  static constexpr size_t kPartialUnits = 1;

  static inline Weights prepare(typename Isa::Bits row) { return Isa::as_float(row); }
  static inline Operand broadcast(const std::byte* p) { return Isa::splat(read<float>(p)); }
  static inline Sum add(Sum sum, Weights weights, Operand operand) {
    return Isa::fma(weights, operand, sum);
  }

  static inline Sum start(const std::byte*, RowOffsets, size_t) { return Isa::zero(); }
  static inline Partial begin(Sum sum) { return sum; }
  static inline Sum end(Sum, Partial partial) { return partial; }
  static inline typename Isa::F32 total(Sum sum) { return sum; }
  static inline typename Isa::F32 scale(typename Isa::F32 weight_scale, const std::byte*,
                                        RowOffsets, size_t) {
    return weight_scale;
  }
};

// Operands in bfloat16, two products with one instruction.
template <class Isa_>
struct PairProducts : FloatProducts<Isa_> {
  using Isa = Isa_;
  using Sum = typename Isa::F32;
  using Weights = typename Isa::Bits;
  using Operand = typename Isa::Bits;
  template <class Format>
  using Reader = typename Format::template Pairs<Isa>;
  static constexpr size_t kDepths = 2;
  static constexpr size_t kTilesAtOnce = 1;  // stored bfloat16 is then read in one stream

  static inline Weights prepare(Weights row) { return row; }
  static inline Operand broadcast(const std::byte* p) { return Isa::splat32(read<int32_t>(p)); }
  static inline Sum add(Sum sum, Weights weights, Operand operand) {
    return Isa::dot_pairs(sum, weights, operand);
  }
};

// Operands in int8: what all ways to multiply them share. Sums are exact.
template <class Isa_>
struct Int8Products {
  using Isa = Isa_;
  using Sum = typename Isa::Bits;
  using Partial = Sum;
  using Operand = typename Isa::Bits;
  static constexpr size_t kDepths = 4;
  static constexpr size_t kSums = Isa::kSums;
  static constexpr size_t kTilesAtOnce = Isa::kTilesAtOnce;
  static constexpr bool kCallsBlocks = false;
  static constexpr size_t kStreamRows = 2;  // so many read one tile after the other
  static constexpr size_t kPartialUnits = 1;

  static inline Operand broadcast(const std::byte* p) { return Isa::splat32(read<int32_t>(p)); }
  static inline Sum start(const std::byte*, RowOffsets, size_t) { return Isa::zero_bits(); }
  static inline Partial begin(Sum sum) { return sum; }
  static inline Sum end(Sum, Partial partial) { return partial; }
  static inline typename Isa::F32 total(Sum sum) { return Isa::to_float(sum); }
  static inline typename Isa::F32 scale(typename Isa::F32 weight_scale, const std::byte* row,
                                        RowOffsets at, size_t group) {
    const auto own = read<float>(row + at.scales + group * sizeof(float));
    return Isa::mul(weight_scale, Isa::splat(own));
  }
};

// Weights with an offset: the sum starts with what the offset will have added too much.
template <class Isa_, class Format_>
struct OffsetProducts : Int8Products<Isa_> {
  using Isa = Isa_;
  using Weights = typename Isa::Bits;
  template <class Format>
  using Reader = typename Format_::template Quads<Isa>;

  static inline Weights prepare(Weights row) { return row; }
  static inline Weights start(const std::byte* row, RowOffsets at, size_t group) {
    const auto sum = read<int32_t>(row + at.sums + group * sizeof(int32_t));
    return Isa::splat32(-Format_::kOffset * sum);
  }
};

// With the dot product of four bytes.
template <class Isa_, class Format>
struct DotProducts : OffsetProducts<Isa_, Format> {
  using Isa = Isa_;
  using Sum = typename Isa::Bits;
  // GCC has registers enough for all of a block's loops only where there are 32.
  static constexpr bool kCallsBlocks = Isa::kLanes == 16;

  static inline Sum add(Sum sum, Sum weights, Sum operand) {
    return Isa::dot_quads(sum, weights, operand);
  }
};

// Without it, for weights of four bits: 16-bit sums hold a step of them (8 * 2 * 15 * 127).
template <class Isa_, class Format>
struct NarrowProducts : OffsetProducts<Isa_, Format> {
  using Isa = Isa_;
  using Sum = typename Isa::Bits;
  static constexpr size_t kSums = Isa::kSums - Isa::kSums / 4;  // and partial sums beside them
  static constexpr size_t kPartialUnits = kStepDepth / kUnitDepth;

  static inline Sum begin(Sum) { return Isa::zero_bits(); }
  static inline Sum add(Sum sum, Sum weights, Sum operand) {
    return Isa::add16(sum, Isa::dot_bytes(weights, operand));
  }
  static inline Sum end(Sum sum, Sum partial) {
    return Isa::dot_pairs16(sum, partial, Isa::splat16(1));
  }
};

// Without it, for weights of eight bits: their signs go to the operand, so that 16 bits hold the
// sum of two products.
template <class Isa_, class Format_>
struct SignProducts : Int8Products<Isa_> {
  using Isa = Isa_;
  using Sum = typename Isa::Bits;
  template <class Format>
  using Reader = typename Format_::template SignedQuads<Isa>;
  struct Weights {
    Sum magnitudes;
    typename Isa::Signs signs;
  };

  static inline Weights prepare(Sum row) { return {Isa::magnitude8(row), Isa::signs8(row)}; }
  static inline Sum add(Sum sum, Weights weights, Sum operand) {
    const Sum pairs = Isa::dot_bytes(weights.magnitudes, Isa::with_signs8(operand, weights.signs));
    return Isa::dot_pairs16(sum, pairs, Isa::splat16(1));
  }
};

}  // namespace
}  // namespace ktt
