// AVX2 and FMA: the vocabulary gemm.h is written in, eight lanes wide.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

struct IsaAvx2 {
  static constexpr size_t kLanes = 8;
  static constexpr size_t kMaxRows = 3;    // 12 sums and what feeds them in 16 registers
  static constexpr size_t kSegment = 512;  // depth of a panel that stays in the first cache
  using F32 = __m256;
  using Pairs = __m256i;  // 8 columns x 2 bfloat16

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
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }

  static inline Pairs load_pairs(const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline void store_pairs(uint16_t* p, Pairs v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static inline F32 even(Pairs v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static inline F32 odd(Pairs v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536)));
  }

  static inline F32 load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  // To the nearest bfloat16, ties to even, still in 32 bits; a NaN stays one.
  static inline F32 round_bf16(F32 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), odd_bit);
    const F32 rounded = odd(_mm256_add_epi32(bits, up));
    const F32 quiet = _mm256_or_ps(odd(bits), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)));
    return _mm256_blendv_ps(rounded, quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  static inline void store_bf16(uint16_t* p, F32 v) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);  // 0-3 0-3 4-7 4-7
    const __m128i eight = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), eight);
  }

  static inline Pairs widen_bytes(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Pairs splat16(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  template <int kBits>
  static inline Pairs shift_left16(Pairs v) {
    return _mm256_slli_epi16(v, kBits);
  }
  static inline Pairs add16(Pairs a, Pairs b) { return _mm256_add_epi16(a, b); }
  static inline Pairs bit_and(Pairs a, Pairs b) { return _mm256_and_si256(a, b); }
  static inline Pairs bit_or(Pairs a, Pairs b) { return _mm256_or_si256(a, b); }
  // table[index & 7] for each 16-bit lane; the table holds low bytes, then high bytes.
  static inline Pairs lookup8(Pairs table, Pairs index) {
    const Pairs low = _mm256_and_si256(index, splat16(7));
    const Pairs both = _mm256_or_si256(low, _mm256_slli_epi16(low, 8));
    return _mm256_shuffle_epi8(table, _mm256_add_epi16(both, splat16(0x0800)));
  }
  static inline Pairs e4m3_subnormals() {
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0x00, 0x00, -0x80, -0x40, 0x00, 0x20, 0x40, 0x60,  //
                      0x00, 0x3B, 0x3B, 0x3B, 0x3C, 0x3C, 0x3C, 0x3C));
  }
  static inline Pairs where_no_bits(Pairs v, Pairs bits, Pairs none, Pairs some) {
    const Pairs is_none = _mm256_cmpeq_epi16(_mm256_and_si256(v, bits), _mm256_setzero_si256());
    return _mm256_blendv_epi8(some, none, is_none);
  }
};

}  // namespace
}  // namespace ktt
