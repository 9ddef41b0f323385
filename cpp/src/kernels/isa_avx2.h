// AVX2 and FMA: the vocabulary gemm.h is written in, eight lanes wide.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

struct IsaAvx2 {
  static constexpr size_t kLanes = 8;
#ifdef KTT_SMALL_BLOCKS
  static constexpr size_t kSums = 6;
#else
  static constexpr size_t kSums = 12;  // what fits beside weights and operand in 16 registers
#endif
  static constexpr size_t kTilesAtOnce = 1;  // for many rows
  using F32 = __m256;
  using Bits = __m256i;

  static inline F32 zero() { return _mm256_setzero_ps(); }
  static inline F32 splat(float v) { return _mm256_set1_ps(v); }
  static inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
  static inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  static inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  static inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  static inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F32 clamp(F32 v, float low, float high) {  // a NaN stays one
    return _mm256_max_ps(splat(low), _mm256_min_ps(splat(high), v));
  }
  static inline F32 round(F32 v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F32 power_of_two(F32 whole) {
    const Bits biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }

  static inline Bits load_bits(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static inline void store_bits(void* p, Bits v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  static inline Bits zero_bits() { return _mm256_setzero_si256(); }
  static inline Bits splat8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static inline Bits splat16(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static inline Bits splat32(int32_t v) { return _mm256_set1_epi32(v); }
  static inline Bits bit_and(Bits a, Bits b) { return _mm256_and_si256(a, b); }
  static inline Bits bit_xor(Bits a, Bits b) { return _mm256_xor_si256(a, b); }
  static inline Bits or_masked(Bits a, Bits b, Bits mask) {  // a | (b & mask)
    return _mm256_or_si256(a, _mm256_and_si256(b, mask));
  }
  static inline Bits add8(Bits a, Bits b) { return _mm256_add_epi8(a, b); }
  static inline Bits add16(Bits a, Bits b) { return _mm256_add_epi16(a, b); }
  static inline Bits add32(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
  template <int kBits>
  static inline Bits shift_left16(Bits v) {
    return _mm256_slli_epi16(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_right16(Bits v) {
    return _mm256_srli_epi16(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_left32(Bits v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static inline Bits shift_right_signed32(Bits v) {
    return _mm256_srai_epi32(v, kBits);
  }
  static inline F32 as_float(Bits v) { return _mm256_castsi256_ps(v); }
  static inline Bits as_bits(F32 v) { return _mm256_castps_si256(v); }
  static inline F32 to_float(Bits v) { return _mm256_cvtepi32_ps(v); }
  static inline Bits to_int(F32 v) { return _mm256_cvtps_epi32(v); }  // nearest, ties to even
  static inline Bits max32(Bits a, Bits b) { return _mm256_max_epi32(a, b); }

  // Within each 16 bytes: byte i is table[index[i] & 15], or 0 where bit 7 of the index is set.
  static inline Bits lookup16(const uint8_t* table, Bits index) {
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), index);
  }
  static constexpr bool kHasLookup128 = false;
  static inline Bits interleave_low8(Bits a, Bits b) { return _mm256_unpacklo_epi8(a, b); }
  static inline Bits interleave_high8(Bits a, Bits b) { return _mm256_unpackhi_epi8(a, b); }

  static inline int32_t max_of(Bits v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static inline int32_t sum_of(Bits v) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  // The low bytes of the lanes, in quad order.
  static inline void store_quads(int8_t* p, Bits v) {
    const Bits order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 8, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const Bits four = _mm256_shuffle_epi8(v, order);
    const __m128i low = _mm256_castsi256_si128(four);
    const __m128i both = _mm_unpacklo_epi32(low, _mm256_extracti128_si256(four, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
  }

  static inline F32 load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  // To the nearest bfloat16, ties to even, still in 32 bits; a NaN stays one.
  static inline F32 round_bf16(F32 v) {
    const Bits bits = as_bits(v);
    const Bits odd_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), splat32(1));
    const Bits up = _mm256_add_epi32(splat32(0x7FFF), odd_bit);
    const Bits high = splat32(-65536);
    const F32 rounded = as_float(_mm256_and_si256(_mm256_add_epi32(bits, up), high));
    const Bits quiet = _mm256_or_si256(_mm256_and_si256(bits, high), splat32(0x7FC00000));
    return _mm256_blendv_ps(rounded, as_float(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  static inline void store_bf16(uint16_t* p, F32 v) {
    const Bits high = _mm256_srli_epi32(as_bits(round_bf16(v)), 16);
    const Bits packed = _mm256_packus_epi32(high, high);  // 0-3 0-3 4-7 4-7
    const __m128i eight = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), eight);
  }

  // The int4 value (stored + 8) whose four bits start at kBit of each lane.
  template <int kBit>
  static inline F32 int4_to_float(Bits v) {
    const Bits top = _mm256_slli_epi32(_mm256_xor_si256(v, splat8(0x88)), 28 - kBit);
    return to_float(_mm256_srai_epi32(top, 28));
  }

  // sum + the dot products of pairs of 16 bits.
  static inline Bits dot_pairs16(Bits sum, Bits a, Bits b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
  static inline Bits dot_bytes(Bits unsigned_bytes, Bits signed_bytes) {  // to 16 bits, saturated
    return _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  }
  static inline Bits magnitude8(Bits v) { return _mm256_abs_epi8(v); }
  using Signs = Bits;
  static inline Signs signs8(Bits v) { return v; }
  static inline Bits with_signs8(Bits v, Signs signs) { return _mm256_sign_epi8(v, signs); }
#if defined(__AVXVNNI__)
  static inline Bits dot_quads(Bits sum, Bits unsigned_bytes, Bits signed_bytes) {
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
  }
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
  static inline Bits dot_quads(Bits sum, Bits unsigned_bytes, Bits signed_bytes) {
    return _mm256_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
#endif
};

}  // namespace
}  // namespace ktt
