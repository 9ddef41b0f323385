// The loops are assembly: a compiler would hoist, merge or spill what is to be counted. Every sum
// is a chain of its own, and there are more of them than the latency of an instruction asks for.
// All operands hold the same bits, a small number in every type: never a denormal, never a NaN.
#include "peaks.h"

#include <cstddef>

#include "kttrio.h"

namespace ktt::bench {
namespace {

constexpr uint32_t kOnes = 0x3f803f80;  // two bfloat16 of 1, one float a little above 1

// Twelve sums, the most that 16 registers hold beside operands and a temporary.
#define KTT_TWELVE "3,4,5,6,7,8,9,10,11,12,13,14"
#define KTT_CLOBBERS                                                                       \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// clang-format off

// Runs `text` for each of twelve sums \i in every step; registers 0 and 1 are operands, 2 is free.
#define KTT_VECTOR_LOOP(name, register, text)           \
  void name(long steps) {                               \
    __asm__ volatile(                                   \
        "vpbroadcastd %1, %%" register "0\n"            \
        "vpbroadcastd %1, %%" register "1\n"            \
        ".irp i," KTT_TWELVE "\n"                       \
        "vpxor %%xmm\\i, %%xmm\\i, %%xmm\\i\n"          \
        ".endr\n"                                       \
        "1:\n"                                          \
        ".irp i," KTT_TWELVE "\n" text "\n.endr\n"      \
        "dec %0\n"                                      \
        "jnz 1b\n"                                      \
        "vzeroupper"                                    \
        : "+r"(steps)                                   \
        : "m"(kOnes)                                    \
        : "cc", KTT_CLOBBERS);                          \
  }

// Bytes without VNNI: pairs to 16 bits, pairs of these to 32 bits, and the sum.
#define KTT_BYTES_IN_THREE(r)                           \
  "vpmaddubsw %%" r "0, %%" r "1, %%" r "2\n"           \
  "vpmaddwd %%" r "0, %%" r "2, %%" r "2\n"             \
  "vpaddd %%" r "2, %%" r "\\i, %%" r "\\i"

// Two by two tiles, as kernels use them: sums in 0 to 3, operands in 4 to 7.
#define KTT_TILE_LOOP(name, instruction)                \
  void name(long steps) {                               \
    alignas(64) uint32_t ones[16 * 16];                 \
    for (uint32_t& pair : ones) pair = kOnes;           \
    const TileConfig config;                            \
    __asm__ volatile(                                   \
        "ldtilecfg %1\n"                                \
        ".irp i,4,5,6,7\n"                              \
        "tileloadd (%2,%3,1), %%tmm\\i\n"               \
        ".endr\n"                                       \
        "1:\n"                                          \
        instruction " %%tmm6, %%tmm4, %%tmm0\n"         \
        instruction " %%tmm7, %%tmm4, %%tmm1\n"         \
        instruction " %%tmm6, %%tmm5, %%tmm2\n"         \
        instruction " %%tmm7, %%tmm5, %%tmm3\n"         \
        "dec %0\n"                                      \
        "jnz 1b\n"                                      \
        "tilerelease"                                   \
        : "+r"(steps)                                   \
        : "m"(config), "r"(ones), "r"(size_t{64})       \
        : "cc", "memory");                              \
  }

// clang-format on

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

KTT_VECTOR_LOOP(float_ymm, "ymm", "vfmadd231ps %%ymm0, %%ymm1, %%ymm\\i")
KTT_VECTOR_LOOP(float_zmm, "zmm", "vfmadd231ps %%zmm0, %%zmm1, %%zmm\\i")
KTT_VECTOR_LOOP(bfloat16_zmm, "zmm", "vdpbf16ps %%zmm0, %%zmm1, %%zmm\\i")
KTT_VECTOR_LOOP(bytes_ymm, "ymm", KTT_BYTES_IN_THREE("ymm"))
KTT_VECTOR_LOOP(bytes_zmm, "zmm", KTT_BYTES_IN_THREE("zmm"))
KTT_VECTOR_LOOP(vnni_ymm, "ymm", "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm\\i")
KTT_VECTOR_LOOP(vnni_zmm, "zmm", "vpdpbusd %%zmm0, %%zmm1, %%zmm\\i")

KTT_TILE_LOOP(bfloat16_tiles, "tdpbf16ps")
KTT_TILE_LOOP(int8_tiles, "tdpbssd")

constexpr size_t kSums = 12;

constexpr double vector_ops(double num_products) { return kSums * 2 * num_products; }
constexpr double tile_ops(double depth) { return 4 * 2 * 16 * 16 * depth; }

constexpr Peak kPeaks[] = {
    {"fp32_ymm", KTT_ISA_AVX2_BASE, vector_ops(8), float_ymm},
    {"int8_ymm", KTT_ISA_AVX2_BASE, vector_ops(32), bytes_ymm},
    {"int8_vnni_ymm", KTT_ISA_AVX2_VNNI, vector_ops(32), vnni_ymm},
    {"fp32_zmm", KTT_ISA_AVX512_BASE, vector_ops(16), float_zmm},
    {"int8_zmm", KTT_ISA_AVX512_BASE, vector_ops(64), bytes_zmm},
    {"int8_vnni_zmm", KTT_ISA_AVX512_VNNI, vector_ops(64), vnni_zmm},
    {"bf16_zmm", KTT_ISA_AVX512_BF16, vector_ops(32), bfloat16_zmm},
    {"bf16_tiles", KTT_ISA_AMX, tile_ops(32), bfloat16_tiles},
    {"int8_tiles", KTT_ISA_AMX, tile_ops(64), int8_tiles},
};

}  // namespace

std::span<const Peak> peaks() { return kPeaks; }

}  // namespace ktt::bench
