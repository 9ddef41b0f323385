// Which instruction sets this machine grants, and the kernel table that goes with the choice.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace ktt {

enum class Isa : int32_t { kAuto = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

inline constexpr Isa kIsasBestFirst[] = {Isa::kAmx, Isa::kAvx512, Isa::kAvx2};

const char* isa_name(Isa isa);

// Both the processor has it and the operating system saves its registers (for AMX: granted this
// process its tiles, which is asked for on the first call). kAuto is never granted.
bool isa_granted(Isa isa);

struct Dispatch {
  Isa isa;
  const KernelTable* table;
};

// Resolves kAuto to the best one granted. Throws Error (kUnsupported) naming what is missing.
Dispatch dispatch(Isa isa);

}  // namespace ktt
