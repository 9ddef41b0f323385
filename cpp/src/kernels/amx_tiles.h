// The seam under isa_amx.h: the six things it asks of tiles. Either the processor's instructions,
// or, with KTT_EMULATE_AMX, a model of them in vector code, so that the indices and the order of
// additions of the kernels above are proven on machines without AMX.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

inline constexpr size_t kTileBytesPerRow = 64;

#ifdef KTT_EMULATE_AMX

namespace tiles {

struct Tile {
  alignas(64) uint8_t row[16][64];
};

inline thread_local Tile file[8];
inline thread_local bool is_configured = false;

inline void configure() { is_configured = true; }
inline void release() { is_configured = false; }

inline Tile& checked(int index) {
  if (!is_configured) __builtin_trap();  // as the processor would
  return file[index];
}

inline __m512i dword_of_row(const Tile& tile, size_t row, size_t index) {
  int32_t dword;
  __builtin_memcpy(&dword, tile.row[row] + 4 * index, 4);
  return _mm512_set1_epi32(dword);
}

template <int kTile>
inline void zero() {
  checked(kTile) = Tile{};
}

template <int kTile>
inline void load(const void* from, size_t stride) {
  for (size_t r = 0; r < 16; ++r) {
    __builtin_memcpy(checked(kTile).row[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

template <int kTile>
inline void store(void* to, size_t stride) {
  for (size_t r = 0; r < 16; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, checked(kTile).row[r], 64);
  }
}

// TDPBF16PS sums the even and the odd products of a column apart, adds the two sums, and adds that.
template <int kC, int kA, int kB>
inline void multiply_pairs() {
  const __m512i high_half = _mm512_set1_epi32(-65536);
  for (size_t m = 0; m < 16; ++m) {
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    for (size_t k = 0; k < 16; ++k) {
      const __m512i a = dword_of_row(checked(kA), m, k);
      const __m512i b = _mm512_load_si512(checked(kB).row[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high_half)),
                            _mm512_castsi512_ps(_mm512_and_si512(b, high_half)), odd);
    }
    const __m512 c = _mm512_load_ps(checked(kC).row[m]);
    _mm512_store_ps(checked(kC).row[m], _mm512_add_ps(c, _mm512_add_ps(even, odd)));
  }
}

template <int kByte>
inline __m512i signed_byte(__m512i dwords) {
  return _mm512_srai_epi32(_mm512_slli_epi32(dwords, 24 - 8 * kByte), 24);
}

template <int kByte>
inline __m512i byte_products(__m512i a, __m512i b) {
  return _mm512_mullo_epi32(signed_byte<kByte>(a), signed_byte<kByte>(b));
}

// TDPBSSD: four products of signed bytes, in 32 bits.
template <int kC, int kA, int kB>
inline void multiply_quads() {
  for (size_t m = 0; m < 16; ++m) {
    __m512i sum = _mm512_load_si512(checked(kC).row[m]);
    for (size_t k = 0; k < 16; ++k) {
      const __m512i a = dword_of_row(checked(kA), m, k);
      const __m512i b = _mm512_load_si512(checked(kB).row[k]);
      sum = _mm512_add_epi32(sum, byte_products<0>(a, b));
      sum = _mm512_add_epi32(sum, byte_products<1>(a, b));
      sum = _mm512_add_epi32(sum, byte_products<2>(a, b));
      sum = _mm512_add_epi32(sum, byte_products<3>(a, b));
    }
    _mm512_store_si512(checked(kC).row[m], sum);
  }
}

}  // namespace tiles

#else

namespace tiles {

struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// Instructions by name: GCC's intrinsics are macros that take a literal tile number only, and
// before 12.4 it believes that its _tile_loadconfig reads 8 of the 64 bytes, and drops stores to
// the rest. `volatile` keeps all of them in the order they are written in.

// All eight tiles are 16 rows of 64 bytes.
inline void configure() {
  Config config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kTileBytesPerRow;
    config.rows[t] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void release() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load(const void* from, size_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* to, size_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// AT&T order: the weights, the rows, the sums.
template <int kC, int kA, int kB>
inline void multiply_pairs() {
  __asm__ volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kC));
}

template <int kC, int kA, int kB>
inline void multiply_quads() {
  __asm__ volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kC));
}

}  // namespace tiles

#endif

}  // namespace
}  // namespace ktt
