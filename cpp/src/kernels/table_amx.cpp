// The AMX table: tiles for bfloat16 and int8 operands, AVX-512 for fp32 ones. The test build
// compiles this file a second time with KTT_EMULATE_AMX.
#include "elementwise.h"
#include "isa_amx.h"
#include "isa_avx512.h"

namespace ktt {
namespace {

constexpr ActivationKernels with_tiles(ActivationKernels kernels) {
  kernels.min_tile_rows = kMinTileRows;
  return kernels;
}

constexpr ActivationKernels pair_kernels() {
  return with_tiles(float_kernels<IsaAvx512, AsBfloat16>(
      &multiply_tiles<PairTiles, FormatBf16>, &multiply_tiles<PairTiles, FormatFp8>,
      &multiply_tiles<PairTiles, FormatInt8>, &multiply_tiles<PairTiles, FormatInt4>));
}

constexpr ActivationKernels quad_kernels() {
  return with_tiles(int8_kernels<IsaAvx512>(&multiply_tiles<QuadTiles, FormatInt8>,
                                            &multiply_tiles<QuadTiles, FormatInt4>));
}

uint32_t enter_tiles() {
  tiles::configure();
  return enter_kernels();
}

// Tiles are given back at once: a thread that holds them is slower to switch and may not idle deep.
void leave_tiles(uint32_t before) {
  tiles::release();
  leave_kernels(before);
}

constexpr KernelTable make_table(const char* name) {
  KernelTable table = kernel_table<IsaAvx512>(name, with_float_products<IsaAvx512, AsFloat>(),
                                              pair_kernels(), quad_kernels());
  table.enter = &enter_tiles;
  table.leave = &leave_tiles;
  return table;
}

}  // namespace

#ifdef KTT_EMULATE_AMX
const KernelTable& table_amx_emulated() {
  static constexpr KernelTable table = make_table("amx_emulated");
  return table;
}
#else
const KernelTable& table_amx() {
  static constexpr KernelTable table = make_table("amx");
  return table;
}
#endif

}  // namespace ktt
