// The weight formats there are: their names and what code outside the kernels must know of them.
// How a format is decoded stands in its own header, format_<name>.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktt {

enum class WeightFormat : int32_t { kBf16 = 0, kFp8 = 1 };

inline constexpr size_t kNumFormats = 2;

struct FormatTraits {
  size_t element_bytes;
  size_t scale_block;  // weights along each side of a scale's square; 0: no scales
};

inline constexpr FormatTraits kFormatTraits[kNumFormats] = {{2, 0}, {1, 128}};

constexpr FormatTraits traits(WeightFormat format) {
  return kFormatTraits[static_cast<size_t>(format)];
}

}  // namespace ktt
