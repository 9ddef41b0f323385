// Weights stored as int8, one bfloat16 scale for a group of a row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "rows.h"

namespace ktt {
namespace {

struct FormatInt8 {
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;

  // The byte that holds depth `depth` of a quad, see "quad order" in layout.h.
  static constexpr int byte_of(size_t depth) {
    return static_cast<int>(depth == 1 ? 2 : depth == 2 ? 1 : depth);
  }

  template <class Isa>
  struct Floats {
    explicit Floats(const std::byte* unit) : unit(unit) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) {
      if constexpr (kRow % 4 == 0) quad = Isa::load_bits(unit + kRow / 4 * kRowBytes);
      return Isa::as_bits(value<kRow % 4>());
    }
    template <size_t kDepth>
    typename Isa::F32 value() const {
      const auto top = Isa::template shift_left32<24 - 8 * byte_of(kDepth)>(quad);
      return Isa::to_float(Isa::template shift_right_signed32<24>(top));
    }
    const std::byte* unit;
    typename Isa::Bits quad;
  };

  // Eight bits are exact in bfloat16, by way of fp32.
  template <class Isa>
  struct Pairs {
    explicit Pairs(const std::byte* unit) : floats(unit) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) {
      const auto even = Isa::as_float(floats.row(Index<2 * kRow>{}));
      return Isa::pair_of(even, Isa::as_float(floats.row(Index<2 * kRow + 1>{})));
    }
    Floats<Isa> floats;
  };

  // As stored, for products that take signed weights.
  template <class Isa>
  using SignedQuads = StoredRows<Isa>;

  // value + 128
  static constexpr int kOffset = 128;
  template <class Isa>
  struct Quads {
    explicit Quads(const std::byte* unit) : unit(unit) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) const {
      return Isa::bit_xor(Isa::load_bits(unit + kRow * kRowBytes), Isa::splat8(0x80));
    }
    const std::byte* unit;
  };
};

}  // namespace
}  // namespace ktt
