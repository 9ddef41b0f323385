// The AVX2 table for processors with the dot product of four bytes (AVX-VNNI). The test build
// compiles this file a second time, for the encoding of the same instruction in AVX-512.
#include "elementwise.h"
#include "isa_avx2.h"

namespace ktt {

const KernelTable& table_avx2_vnni() {
  static constexpr KernelTable table = kernel_table<IsaAvx2>(
      "avx2_vnni", with_float_products<IsaAvx2, AsFloat>(),
      with_float_products<IsaAvx2, AsRoundedFloat>(), with_dot_products<IsaAvx2>());
  return table;
}

}  // namespace ktt
