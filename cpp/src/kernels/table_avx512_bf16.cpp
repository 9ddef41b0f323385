// The AVX-512 table for processors with the bfloat16 dot product.
#include "elementwise.h"
#include "isa_avx512.h"

namespace ktt {

const KernelTable& table_avx512_bf16() {
  using Exact = VectorRows<FloatDot<IsaAvx512>>;
  using Fast = VectorRows<PairDot<IsaAvx512>>;
  static constexpr KernelTable table = kernel_table<IsaAvx512>(
      "avx512_bf16", activation_kernels<IsaAvx512, Exact, AsFloat>(kNoTiles),
      activation_kernels<IsaAvx512, Fast, AsBfloat16>(kNoTiles));
  return table;
}

}  // namespace ktt
