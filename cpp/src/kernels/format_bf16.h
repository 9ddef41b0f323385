// Weights stored as bfloat16: nothing to decode, no scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ktt {
namespace {

struct FormatBf16 {
  using Storage = uint16_t;
  static constexpr bool kDecodes = false;
  static constexpr size_t kScaleBlock = traits(WeightFormat::kBf16).scale_block;

  template <class Isa>
  static inline typename Isa::Pairs load(const Storage* weights) {
    return Isa::load_pairs(weights);
  }
};

}  // namespace
}  // namespace ktt
