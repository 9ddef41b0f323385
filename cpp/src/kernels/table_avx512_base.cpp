// The AVX-512 table for processors with none of the dot products.
#include "elementwise.h"
#include "isa_avx512.h"

namespace ktt {

const KernelTable& table_avx512_base() {
  static constexpr KernelTable table = kernel_table<IsaAvx512>(
      "avx512_base", with_float_products<IsaAvx512, AsFloat>(),
      with_float_products<IsaAvx512, AsRoundedFloat>(), with_byte_products<IsaAvx512>());
  return table;
}

}  // namespace ktt
