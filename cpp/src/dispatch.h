// Which instruction sets this machine grants, and the kernel table that goes with the choice.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace ktt {

// kAvx2 and kAvx512 stand for the best table of their kind, kAuto for the best of all; every other
// one is a kernel table.
enum class Isa : int32_t {
  kAuto = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAmx = 3,
  kAvx2Base = 4,
  kAvx2Vnni = 5,
  kAvx512Base = 6,
  kAvx512Vnni = 7,
  kAvx512Bf16 = 8,
};

// Both the processor has it and the operating system saves its registers (for AMX: granted this
// process its tiles, which is asked for on the first call). kAuto is never granted.
bool isa_granted(Isa isa);

struct Dispatch {
  Isa isa;  // that of the table
  const KernelTable* table;
};

// The best table granted that `isa` stands for. Throws Error (kUnsupported) naming those that are.
Dispatch dispatch(Isa isa);

}  // namespace ktt
