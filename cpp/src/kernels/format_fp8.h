// Weights stored as float8 e4m3fn, one fp32 scale for a square of 128 x 128. Every code but NaN,
// which packing refuses, becomes its exact bfloat16 value; scales meet the fp32 sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "rows.h"

namespace ktt {
namespace {

// The bfloat16 of each code without its sign, low bytes and high bytes apart.
struct E4m3Tables {
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};
  // For decoding by halves of the code: the high byte by the code's high half, and in entries 8-15
  // what the two bytes of the eight subnormals differ in from what normal codes' rule gives.
  alignas(16) uint8_t high_by_half[16] = {};
  alignas(16) uint8_t low_repair[16] = {};
  alignas(16) uint8_t high_repair[16] = {};

  constexpr E4m3Tables() {
    for (unsigned code = 0; code < 128; ++code) {
      const unsigned bits = code >= 8 ? (code << 4) + (120u << 7) : subnormal(code);
      low[code] = static_cast<uint8_t>(bits & 255);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
    for (unsigned half = 0; half < 16; ++half) {
      high_by_half[half] = static_cast<uint8_t>((half & 8) << 4 | ((half & 7) + 60));
    }
    for (unsigned code = 0; code < 8; ++code) {
      low_repair[8 + code] = static_cast<uint8_t>(low[code] ^ code << 4);
      high_repair[8 + code] = static_cast<uint8_t>(high[code] ^ high_by_half[0]);
    }
  }

  static constexpr unsigned subnormal(unsigned mantissa) {  // mantissa * 2^-9
    if (mantissa == 0) return 0;
    unsigned exponent = 127 - 9 + 2;
    for (; mantissa < 4; mantissa *= 2) --exponent;
    return exponent << 7 | (mantissa & 3) << 5;
  }
};
inline constexpr E4m3Tables kE4m3;

struct FormatFp8 {
  static constexpr WeightFormat kFormat = WeightFormat::kFp8;

  template <class Isa>
  struct Pairs {
    explicit Pairs(const std::byte* unit) : unit(unit) {}
    template <size_t kRow>
    typename Isa::Bits row(Index<kRow>) {
      if constexpr (kRow % 2 == 0) {
        decode(Isa::load_bits(unit + kRow / 2 * kRowBytes));
        return Isa::interleave_low8(low, high);
      } else {
        return Isa::interleave_high8(low, high);
      }
    }

    void decode(typename Isa::Bits code) {
      if constexpr (Isa::kHasLookup128) {
        low = Isa::lookup128(kE4m3.low, code);
        high = Isa::or_masked(Isa::lookup128(kE4m3.high, code), code, Isa::splat8(0x80));
      } else {
        decode_by_halves(code);
      }
    }

    // Code s eeee mmm as bfloat16 is s (eeee + 120) mmm0000: the low byte is the code's low half
    // moved up, the high byte depends on the code's high half alone. Subnormals are repaired
    // afterwards: for all other codes bit 7 of the index is set, and lookup16 gives 0.
    void decode_by_halves(typename Isa::Bits code) {
      const auto half_mask = Isa::splat8(0x0F);
      const auto low_half = Isa::bit_and(code, half_mask);
      const auto high_half = Isa::bit_and(Isa::template shift_right16<4>(code), half_mask);
      const auto index = Isa::add8(Isa::bit_and(code, Isa::splat8(0x7F)), Isa::splat8(0x78));
      low = Isa::bit_xor(Isa::template shift_left16<4>(low_half),
                         Isa::lookup16(kE4m3.low_repair, index));
      high = Isa::bit_xor(Isa::lookup16(kE4m3.high_by_half, high_half),
                          Isa::lookup16(kE4m3.high_repair, index));
    }

    const std::byte* unit;
    typename Isa::Bits low, high;
  };

  template <class Isa>
  using Floats = FloatsOfPairs<Isa, Pairs<Isa>>;
};

}  // namespace
}  // namespace ktt
