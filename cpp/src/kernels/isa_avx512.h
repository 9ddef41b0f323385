// AVX-512 (F, BW, DQ, VL): the vocabulary gemm.h is written in, sixteen lanes wide. What later
// extensions add is here too, for the files that are compiled with them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

struct IsaAvx512 {
  static constexpr size_t kLanes = 16;
#ifdef KTT_SMALL_BLOCKS
  static constexpr size_t kSums = 4;
#else
  static constexpr size_t kSums = 16;  // leaves registers for decoding
#endif
  static constexpr size_t kTilesAtOnce = 2;  // for many rows
  using F32 = __m512;
  using Bits = __m512i;

  static inline F32 zero() { return _mm512_setzero_ps(); }
  static inline F32 splat(float v) { return _mm512_set1_ps(v); }
  static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F32 clamp(F32 v, float low, float high) {  // a NaN stays one
    return _mm512_max_ps(splat(low), _mm512_min_ps(splat(high), v));
  }
  static inline F32 round(F32 v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F32 power_of_two(F32 whole) {
    const Bits biased = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  static inline Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store_bits(void* p, Bits v) { _mm512_storeu_si512(p, v); }
  static inline Bits zero_bits() { return _mm512_setzero_si512(); }
  static inline Bits splat8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static inline Bits splat16(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static inline Bits splat32(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Bits bit_and(Bits a, Bits b) { return _mm512_and_si512(a, b); }
  static inline Bits bit_xor(Bits a, Bits b) { return _mm512_xor_si512(a, b); }
  static inline Bits or_masked(Bits a, Bits b, Bits mask) {  // a | (b & mask)
    return _mm512_ternarylogic_epi32(a, b, mask, 0xF8);
  }
  static inline Bits add8(Bits a, Bits b) { return _mm512_add_epi8(a, b); }
  static inline Bits add16(Bits a, Bits b) { return _mm512_add_epi16(a, b); }
  static inline Bits add32(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
  template <int kBits>
  static inline Bits shift_left16(Bits v) {
    return _mm512_slli_epi16(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_right16(Bits v) {
    return _mm512_srli_epi16(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_left32(Bits v) {
    return _mm512_slli_epi32(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_right_signed32(Bits v) {
    return _mm512_srai_epi32(v, kBits);
  }
  static inline F32 as_float(Bits v) { return _mm512_castsi512_ps(v); }
  static inline Bits as_bits(F32 v) { return _mm512_castps_si512(v); }
  static inline F32 to_float(Bits v) { return _mm512_cvtepi32_ps(v); }
  static inline Bits to_int(F32 v) { return _mm512_cvtps_epi32(v); }  // nearest, ties to even
  static inline Bits max32(Bits a, Bits b) { return _mm512_max_epi32(a, b); }

  // Within each 16 bytes: byte i is table[index[i] & 15], or 0 where bit 7 of the index is set.
  static inline Bits lookup16(const uint8_t* table, Bits index) {
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), index);
  }
#ifdef __AVX512VBMI__
  static constexpr bool kHasLookup128 = true;
  // table[index & 127]
  static inline Bits lookup128(const uint8_t* table, Bits index) {
    return _mm512_permutex2var_epi8(load_bits(table), index, load_bits(table + 64));
  }
#else
  static constexpr bool kHasLookup128 = false;
#endif
  static inline Bits interleave_low8(Bits a, Bits b) { return _mm512_unpacklo_epi8(a, b); }
  static inline Bits interleave_high8(Bits a, Bits b) { return _mm512_unpackhi_epi8(a, b); }

  static inline int32_t max_of(Bits v) { return _mm512_reduce_max_epi32(v); }
  static inline int32_t sum_of(Bits v) { return _mm512_reduce_add_epi32(v); }
  // The low bytes of the lanes, in quad order.
  static inline void store_quads(int8_t* p, Bits v) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static inline F32 load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // To the nearest bfloat16, ties to even, still in 32 bits; a NaN stays one.
  static inline F32 round_bf16(F32 v) {
    const Bits bits = as_bits(v);
    const Bits odd_bit = _mm512_and_si512(_mm512_srli_epi32(bits, 16), splat32(1));
    const Bits up = _mm512_add_epi32(splat32(0x7FFF), odd_bit);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const Bits quiet = _mm512_or_si512(bits, splat32(0x7FC00000));
    const Bits rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, up), is_nan, quiet);
    return as_float(_mm512_and_si512(rounded, splat32(-65536)));
  }
  static inline void store_bf16(uint16_t* p, F32 v) {
    const Bits high = _mm512_srli_epi32(as_bits(round_bf16(v)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }

  // The int4 value (stored + 8) whose four bits start at kBit of each lane: a permutation reads
  // four bits of its index and no more.
  template <int kBit>
  static inline F32 int4_to_float(Bits v) {
    const F32 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, kBit), values);
  }
  // The same in bfloat16, for lanes of 16 bits; five bits are read here, so the table is there
  // twice.
  template <int kBit>
  static inline Bits int4_to_pairs(Bits v) {
    const Bits values = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(-0x3F00, -0x3F20, -0x3F40, -0x3F60, -0x3F80, -0x3FC0, -0x4000, -0x4080,
                          0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0));
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(v, kBit), values);
  }
  // The high halves of both: low's in the low half of each lane, high's in the high half.
  static inline Bits pair_of(F32 low, F32 high) {
    return or_masked(_mm512_srli_epi32(as_bits(low), 16), as_bits(high), splat32(-65536));
  }

  static inline Bits dot_pairs16(Bits sum, Bits a, Bits b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
  static inline Bits dot_bytes(Bits unsigned_bytes, Bits signed_bytes) {  // to 16 bits, saturated
    return _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
  }
  static inline Bits magnitude8(Bits v) { return _mm512_abs_epi8(v); }
  using Signs = __mmask64;
  static inline Signs signs8(Bits v) { return _mm512_movepi8_mask(v); }
  static inline Bits with_signs8(Bits v, Signs signs) {
    return _mm512_mask_sub_epi8(v, signs, _mm512_setzero_si512(), v);
  }
#ifdef __AVX512VNNI__
  static inline Bits dot_quads(Bits sum, Bits unsigned_bytes, Bits signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
#endif
#ifdef __AVX512BF16__
  static inline F32 dot_pairs(F32 sum, Bits a, Bits b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
#endif
};

}  // namespace
}  // namespace ktt
