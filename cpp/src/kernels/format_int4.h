// Weights stored as four bits, value + 8, one bfloat16 scale for a group of a row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "rows.h"

namespace ktt {
namespace {

struct FormatInt4 {
  static constexpr WeightFormat kFormat = WeightFormat::kInt4;

  template <class Isa>
  struct Floats {
    explicit Floats(const std::byte* unit) : bits(Isa::load_bits(unit)) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) const {
      constexpr int kBit[8] = {0, 16, 8, 24, 4, 20, 12, 28};
      return Isa::as_bits(Isa::template int4_to_float<kBit[kRow]>(bits));
    }
    typename Isa::Bits bits;
  };

  template <class Isa>
  struct Pairs {
    explicit Pairs(const std::byte* unit) : bits(Isa::load_bits(unit)) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) const {
      constexpr int kBit[4] = {0, 8, 4, 12};
      return Isa::template int4_to_pairs<kBit[kRow]>(bits);
    }
    typename Isa::Bits bits;
  };

  // value + 8
  static constexpr int kOffset = 8;
  template <class Isa>
  struct Quads {
    explicit Quads(const std::byte* unit) : bits(Isa::load_bits(unit)) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) const {
      return Isa::bit_and(Isa::template shift_right16<4 * kRow>(bits), Isa::splat8(0x0F));
    }
    typename Isa::Bits bits;
  };
};

}  // namespace
}  // namespace ktt
