// The AVX-512 table for processors without the bfloat16 dot product.
#include "elementwise.h"
#include "isa_avx512.h"

namespace ktt {

const KernelTable& table_avx512() {
  using Rows = VectorRows<FloatDot<IsaAvx512>>;
  static constexpr KernelTable table =
      kernel_table<IsaAvx512>("avx512", activation_kernels<IsaAvx512, Rows, AsFloat>(kNoTiles),
                              activation_kernels<IsaAvx512, Rows, AsRoundedFloat>(kNoTiles));
  return table;
}

}  // namespace ktt
