// The AVX2 table: AVX2 and FMA, nothing newer.
#include "elementwise.h"
#include "isa_avx2.h"

namespace ktt {

const KernelTable& table_avx2_base() {
  static constexpr KernelTable table = kernel_table<IsaAvx2>(
      "avx2_base", with_float_products<IsaAvx2, AsFloat>(),
      with_float_products<IsaAvx2, AsRoundedFloat>(), with_byte_products<IsaAvx2>());
  return table;
}

}  // namespace ktt
