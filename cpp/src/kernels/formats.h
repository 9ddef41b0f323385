// The weight formats there are: their names and what code outside the kernels must know of them.
// How a format is decoded stands in its own header, format_<name>.h; how it is packed in layout.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktt {

// kBf16  bfloat16.
// kFp8   float8 e4m3fn, one fp32 scale for a square of 128 x 128.
// kInt8  two's complement, one bfloat16 scale for `group` weights of a row.
// kInt4  value + 8 in four bits, two to a byte, the lower depth in the low bits; scales as kInt8.
enum class WeightFormat : int32_t { kBf16 = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };

inline constexpr size_t kNumFormats = 4;

enum class Scales : int32_t { kNone, kSquares, kGroups };

struct FormatTraits {
  size_t bits;         // of one weight
  Scales scales;       // kSquares: fp32 for 128 x 128; kGroups: bfloat16 along a row
  size_t scale_bytes;  // of one scale
};

inline constexpr FormatTraits kFormatTraits[kNumFormats] = {{16, Scales::kNone, 0},
                                                            {8, Scales::kSquares, 4},
                                                            {8, Scales::kGroups, 2},
                                                            {4, Scales::kGroups, 2}};

constexpr FormatTraits traits(WeightFormat format) {
  return kFormatTraits[static_cast<size_t>(format)];
}

// Bytes of `count` weights.
constexpr size_t weight_bytes(WeightFormat format, size_t count) {
  return count * traits(format).bits / 8;
}

}  // namespace ktt
