#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

#include "error.h"

namespace ktt {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

constexpr bool bit(unsigned word, int index) { return (word >> index & 1u) != 0; }

// The register states the operating system saves (XCR0); asked for only when it lets us ask.
uint64_t saved_states() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool saves(uint64_t states) { return (saved_states() & states) == states; }

constexpr uint64_t kAvxStates = 0x6;       // SSE, AVX
constexpr uint64_t kAvx512States = 0xE6;   // and mask registers, upper halves, upper sixteen
constexpr uint64_t kTileStates = 0x60000;  // tile configuration, tile data

bool has_avx2() {
  const bool has_fma = bit(cpuid(1, 0).c, 12);
  return has_fma && bit(cpuid(7, 0).b, 5) && saves(kAvxStates);
}

bool has_avx512() {
  const unsigned features = cpuid(7, 0).b;
  const bool has_all = bit(features, 16) && bit(features, 17) && bit(features, 30) &&
                       bit(features, 31);  // F, DQ, BW, VL
  return has_avx2() && has_all && saves(kAvx512States);
}

bool has_avx512_bf16() { return has_avx512() && bit(cpuid(7, 1).a, 5); }

// Linux grants tile data on request only, to the whole process and its later threads.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  const unsigned features = cpuid(7, 0).d;
  const bool has_all = bit(features, 22) && bit(features, 24);  // AMX_BF16, AMX_TILE
  if (!has_all || !has_avx512() || !saves(kTileStates)) return false;
  static const bool granted = request_tiles();
  return granted;
}

const KernelTable& table_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return table_amx();
    case Isa::kAvx512:
      return has_avx512_bf16() ? table_avx512_bf16() : table_avx512();
    default:
      return table_avx2();
  }
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "auto";
  }
}

bool isa_granted(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return has_amx();
    case Isa::kAvx512:
      return has_avx512();
    case Isa::kAvx2:
      return has_avx2();
    default:
      return false;
  }
}

Dispatch dispatch(Isa isa) {
  if (isa != Isa::kAuto) {
    if (isa_granted(isa)) return {isa, &table_of(isa)};
    throw Error(ErrorCode::kUnsupported,
                std::string("this machine does not grant the instruction set ") + isa_name(isa) +
                    " (processor or operating system); auto takes the best one there is");
  }
  for (const Isa candidate : kIsasBestFirst) {
    if (isa_granted(candidate)) return {candidate, &table_of(candidate)};
  }
  throw Error(ErrorCode::kUnsupported, "the expert kernels need at least AVX2 and FMA");
}

}  // namespace ktt
