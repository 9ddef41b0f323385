// The AVX-512 table for processors with the dot product of four bytes (VNNI).
#include "elementwise.h"
#include "isa_avx512.h"

namespace ktt {

const KernelTable& table_avx512_vnni() {
  static constexpr KernelTable table = kernel_table<IsaAvx512>(
      "avx512_vnni", with_float_products<IsaAvx512, AsFloat>(),
      with_float_products<IsaAvx512, AsRoundedFloat>(), with_dot_products<IsaAvx512>());
  return table;
}

}  // namespace ktt
