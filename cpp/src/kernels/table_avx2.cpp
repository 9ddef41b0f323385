// The AVX2 table. Compiled with AVX2 and FMA and nothing newer.
#include "elementwise.h"
#include "isa_avx2.h"

namespace ktt {

const KernelTable& table_avx2() {
  using Rows = VectorRows<FloatDot<IsaAvx2>>;
  static constexpr KernelTable table =
      kernel_table<IsaAvx2>("avx2", activation_kernels<IsaAvx2, Rows, AsFloat>(kNoTiles),
                            activation_kernels<IsaAvx2, Rows, AsRoundedFloat>(kNoTiles));
  return table;
}

}  // namespace ktt
