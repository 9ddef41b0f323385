// Weights stored as bfloat16: pairs of depths as they are, no scales.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "rows.h"

namespace ktt {
namespace {

struct FormatBf16 {
  static constexpr WeightFormat kFormat = WeightFormat::kBf16;
  template <class Isa>
  using Pairs = StoredRows<Isa>;
  template <class Isa>
  using Floats = FloatsOfPairs<Isa, Pairs<Isa>>;
};

}  // namespace
}  // namespace ktt
