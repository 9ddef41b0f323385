// The AVX-512 table for processors with both dot products (VNNI, BF16) and byte permutations
// (VBMI).
#include "elementwise.h"
#include "isa_avx512.h"

namespace ktt {

const KernelTable& table_avx512_bf16() {
  static constexpr KernelTable table =
      kernel_table<IsaAvx512>("avx512_bf16", with_float_products<IsaAvx512, AsFloat>(),
                              with_pair_products<IsaAvx512>(), with_dot_products<IsaAvx512>());
  return table;
}

}  // namespace ktt
