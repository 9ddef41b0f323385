// Weights stored as float8 e4m3fn, one fp32 scale for a square of 128 x 128. Every code but NaN,
// which packing refuses, becomes its exact bfloat16 value; scales meet the fp32 sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ktt {
namespace {

struct FormatFp8 {
  using Storage = uint8_t;
  static constexpr bool kDecodes = true;
  static constexpr size_t kScaleBlock = traits(WeightFormat::kFp8).scale_block;

  // s eeee mmm -> s 0eeeeeee mmm0000: move the fields, add the difference of the exponent biases
  // (127 - 7). With eeee = 0 the value is mmm * 2^-9 instead, which a table of eight holds.
  template <class Isa>
  static inline typename Isa::Pairs load(const Storage* weights) {
    const auto code = Isa::widen_bytes(weights);
    const auto moved = Isa::bit_and(Isa::template shift_left16<4>(code), Isa::splat16(0x87F0));
    const auto normal = Isa::add16(moved, Isa::splat16(120 << 7));
    const auto small = Isa::bit_or(Isa::lookup8(Isa::e4m3_subnormals(), code),
                                   Isa::bit_and(code, Isa::splat16(0x8000)));
    return Isa::where_no_bits(code, Isa::splat16(0x78), small, normal);
  }
};

}  // namespace
}  // namespace ktt
