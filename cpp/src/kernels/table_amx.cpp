// The AMX table: tiles for bfloat16 operands, AVX-512 for fp32 ones. The test build compiles this
// file a second time with KTT_EMULATE_AMX.
#include "elementwise.h"
#include "isa_amx.h"
#include "isa_avx512.h"

namespace ktt {
namespace {

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
  using Exact = VectorRows<FloatDot<IsaAvx512>>;
  KernelTable table =
      kernel_table<IsaAvx512>(name, activation_kernels<IsaAvx512, Exact, AsFloat>(kNoTiles),
                              activation_kernels<IsaAvx512, TileRows, AsBfloat16>(kMinTileRows));
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
