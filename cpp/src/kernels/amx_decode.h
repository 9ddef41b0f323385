// Packed weights (see layout.h) to what tiles multiply: rows of 64 bytes, for each of 16 columns a
// pair of bfloat16 or a quad of int8. Every processor with AMX has AVX-512 VBMI.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "layout.h"

namespace ktt {
namespace {

// bfloat16 of 128 codes, low and high bytes apart, as the two-register byte lookup wants them.
struct ByteTables {
  alignas(64) std::array<uint8_t, 128> low;
  alignas(64) std::array<uint8_t, 128> high;
};

// Of mantissa * 2^exponent, where at most eight bits of the mantissa are used.
constexpr uint16_t bf16_bits(unsigned mantissa, int exponent) {
  if (mantissa == 0) return 0;
  int biased = exponent + 127 + 7;
  for (; mantissa < 128; mantissa *= 2) --biased;
  return static_cast<uint16_t>(static_cast<unsigned>(biased) << 7 | (mantissa & 127));
}

constexpr uint16_t bf16_of_e4m3(unsigned code) {
  const unsigned exponent = code >> 3;
  const unsigned mantissa = code & 7;
  return exponent == 0 ? bf16_bits(mantissa, -9)
                       : bf16_bits(8 + mantissa, static_cast<int>(exponent) - 10);
}

constexpr uint16_t bf16_of_integer(unsigned code) { return bf16_bits(code, 0); }

template <class Value>
constexpr ByteTables byte_tables(Value value) {
  ByteTables tables{};
  for (unsigned code = 0; code < 128; ++code) {
    tables.low[code] = static_cast<uint8_t>(value(code) & 0xFF);
    tables.high[code] = static_cast<uint8_t>(value(code) >> 8);
  }
  return tables;
}

inline constexpr ByteTables kE4m3Tables = byte_tables(bf16_of_e4m3);
inline constexpr ByteTables kIntegerTables = byte_tables(bf16_of_integer);

inline __m512i load_row(const std::byte* from) { return _mm512_loadu_si512(from); }
inline void store_row(std::byte* to, __m512i row) { _mm512_store_si512(to, row); }

inline __m512i look_up(const std::array<uint8_t, 128>& table, __m512i code) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table.data()), code,
                                  _mm512_load_si512(table.data() + 64));
}

inline __m512i with_sign_of(__m512i high, __m512i code) {  // high | (code & 0x80)
  return _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);
}

// One unit, 8 depths of 16 columns, to four rows of pairs or two rows of quads.
template <WeightFormat kFormat>
struct Unit;

template <>
struct Unit<WeightFormat::kFp8> {
  static inline void to_pairs(const std::byte* from, std::byte* to) {
    for (size_t q = 0; q < 2; ++q) {
      const __m512i code = load_row(from + 64 * q);
      const __m512i low = look_up(kE4m3Tables.low, code);
      const __m512i high = with_sign_of(look_up(kE4m3Tables.high, code), code);
      store_row(to + 128 * q, _mm512_unpacklo_epi8(low, high));
      store_row(to + 128 * q + 64, _mm512_unpackhi_epi8(low, high));
    }
  }
};

template <>
struct Unit<WeightFormat::kInt8> {
  static inline void to_pairs(const std::byte* from, std::byte* to) {
    const __m512i low_byte = _mm512_set1_epi16(0xFF);
    for (size_t q = 0; q < 2; ++q) {
      const __m512i code = load_row(from + 64 * q);
      const __m512i size = _mm512_abs_epi8(code);
      const __m512i low = look_up(kIntegerTables.low, size);
      const __m512i high = with_sign_of(look_up(kIntegerTables.high, size), code);
      // low_byte ? first : second, bit by bit
      store_row(to + 128 * q,
                _mm512_ternarylogic_epi32(low_byte, low, _mm512_slli_epi16(high, 8), 0xCA));
      store_row(to + 128 * q + 64,
                _mm512_ternarylogic_epi32(low_byte, _mm512_srli_epi16(low, 8), high, 0xCA));
    }
  }

  static inline void to_quads(const std::byte* from, std::byte* to) {
    store_row(to, load_row(from));
    store_row(to + 64, load_row(from + 64));
  }
};

template <>
struct Unit<WeightFormat::kInt4> {
  // The lookup reads five bits of an index; the table's two halves are the same, so that the bit
  // above a weight's four does not count.
  static inline void to_pairs(const std::byte* from, std::byte* to) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        static_cast<short>(0xC100), static_cast<short>(0xC0E0), static_cast<short>(0xC0C0),
        static_cast<short>(0xC0A0), static_cast<short>(0xC080), static_cast<short>(0xC040),
        static_cast<short>(0xC000), static_cast<short>(0xBF80), 0, 0x3F80, 0x4000, 0x4040, 0x4080,
        0x40A0, 0x40C0, 0x40E0));  // -8 to 7
    const __m512i codes = load_row(from);
    store_row(to, _mm512_permutexvar_epi16(codes, table));
    store_row(to + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
    store_row(to + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
    store_row(to + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
  }

  static inline void to_quads(const std::byte* from, std::byte* to) {
    const __m512i low_bits = _mm512_set1_epi8(15);
    const __m512i offset = _mm512_set1_epi8(8);
    const __m512i codes = load_row(from);
    const __m512i low = _mm512_and_si512(codes, low_bits);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_bits);
    store_row(to, _mm512_sub_epi8(low, offset));
    store_row(to + 64, _mm512_sub_epi8(high, offset));
  }
};

}  // namespace
}  // namespace ktt
