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
  const unsigned features = cpuid(1, 0).c;
  const bool has_fma_f16c = bit(features, 12) && bit(features, 29);
  return has_fma_f16c && bit(cpuid(7, 0).b, 5) && saves(kAvxStates);
}

bool has_avx2_vnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }

bool has_avx512() {
  const unsigned features = cpuid(7, 0).b;
  const bool has_all = bit(features, 16) && bit(features, 17) && bit(features, 30) &&
                       bit(features, 31);  // F, DQ, BW, VL
  return has_avx2() && has_all && saves(kAvx512States);
}

bool has_avx512_vnni() { return has_avx512() && bit(cpuid(7, 0).c, 11); }

bool has_avx512_bf16() {
  const bool has_vbmi = bit(cpuid(7, 0).c, 1);
  return has_avx512_vnni() && has_vbmi && bit(cpuid(7, 1).a, 5);
}

// Linux grants tile data on request only, to the whole process and its later threads.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  const unsigned features = cpuid(7, 0).d;
  const bool has_all =
      bit(features, 22) && bit(features, 24) && bit(features, 25);  // BF16, TILE, INT8
  if (!has_all || !has_avx512_bf16() || !saves(kTileStates)) return false;
  static const bool granted = request_tiles();
  return granted;
}

struct Entry {
  Isa isa;
  Isa kind;  // that it is one of
  const char* name;
  bool (*is_granted)();
  const KernelTable& (*table)();
};

constexpr Entry kBestFirst[] = {
    {Isa::kAmx, Isa::kAmx, "amx", &has_amx, &table_amx},
    {Isa::kAvx512Bf16, Isa::kAvx512, "avx512_bf16", &has_avx512_bf16, &table_avx512_bf16},
    {Isa::kAvx512Vnni, Isa::kAvx512, "avx512_vnni", &has_avx512_vnni, &table_avx512_vnni},
    {Isa::kAvx512Base, Isa::kAvx512, "avx512_base", &has_avx512, &table_avx512_base},
    {Isa::kAvx2Vnni, Isa::kAvx2, "avx2_vnni", &has_avx2_vnni, &table_avx2_vnni},
    {Isa::kAvx2Base, Isa::kAvx2, "avx2_base", &has_avx2, &table_avx2_base},
};

bool stands_for(Isa isa, const Entry& entry) {
  return isa == Isa::kAuto || isa == entry.kind || isa == entry.isa;
}

const Entry* best_granted(Isa isa) {
  for (const Entry& entry : kBestFirst) {
    if (stands_for(isa, entry) && entry.is_granted()) return &entry;
  }
  return nullptr;
}

std::string name_of(Isa isa) {
  if (isa == Isa::kAvx2) return "avx2";
  if (isa == Isa::kAvx512) return "avx512";
  for (const Entry& entry : kBestFirst) {
    if (entry.isa == isa) return entry.name;
  }
  return "auto";
}

std::string granted_names() {
  std::string names;
  for (const Entry& entry : kBestFirst) {
    if (entry.is_granted()) names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  return names;
}

}  // namespace

bool isa_granted(Isa isa) { return isa != Isa::kAuto && best_granted(isa) != nullptr; }

Dispatch dispatch(Isa isa) {
  const Entry* entry = best_granted(isa);
  if (entry != nullptr) return {entry->isa, &entry->table()};
  const std::string names = granted_names();
  throw Error(ErrorCode::kUnsupported,
              names.empty() ? "the expert kernels need a processor with AVX2, FMA and F16C"
                            : "this machine does not grant the instruction set " + name_of(isa) +
                                  " (processor or operating system); it grants " + names);
}

}  // namespace ktt
