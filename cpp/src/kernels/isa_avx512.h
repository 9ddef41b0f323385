// AVX-512 F, BW, DQ and VL: the vocabulary gemm.h is written in, sixteen lanes wide. The dot
// product of bfloat16 pairs is here as well, for files compiled with AVX512_BF16.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ktt {
namespace {

struct IsaAvx512 {
  static constexpr size_t kLanes = 16;
  static constexpr size_t kMaxRows = 8;
  static constexpr size_t kSegment = 512;  // depth of a panel that stays in the first cache
  using F32 = __m512;
  using Pairs = __m512i;  // 16 columns x 2 bfloat16

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
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  static inline Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static inline void store_pairs(uint16_t* p, Pairs v) { _mm512_storeu_si512(p, v); }
  static inline F32 even(Pairs v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static inline F32 odd(Pairs v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
  }

  static inline F32 load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // To the nearest bfloat16, ties to even, still in 32 bits; a NaN stays one.
  static inline F32 round_bf16(F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd_bit = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd_bit);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x7FC00000));
    return odd(_mm512_mask_mov_epi32(_mm512_add_epi32(bits, up), is_nan, quiet));
  }
  static inline void store_bf16(uint16_t* p, F32 v) {
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(round_bf16(v)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }

  static inline Pairs widen_bytes(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Pairs splat16(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  template <int kBits>
  static inline Pairs shift_left16(Pairs v) {
    return _mm512_slli_epi16(v, kBits);
  }
  static inline Pairs add16(Pairs a, Pairs b) { return _mm512_add_epi16(a, b); }
  static inline Pairs bit_and(Pairs a, Pairs b) { return _mm512_and_si512(a, b); }
  static inline Pairs bit_or(Pairs a, Pairs b) { return _mm512_or_si512(a, b); }
  // table[index & 7] for each 16-bit lane: the permutation reads five bits, so the table is
  // repeated four times.
  static inline Pairs lookup8(Pairs table, Pairs index) {
    return _mm512_permutexvar_epi16(index, table);
  }
  static inline Pairs e4m3_subnormals() {
    return _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
  }
  static inline Pairs where_no_bits(Pairs v, Pairs bits, Pairs none, Pairs some) {
    return _mm512_mask_mov_epi16(some, _mm512_testn_epi16_mask(v, bits), none);
  }

  static inline Pairs splat_pair(const uint16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, sizeof(both));
    return _mm512_set1_epi32(both);
  }
#ifdef __AVX512BF16__
  static inline F32 dot_pairs(F32 sum, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
#endif
};

}  // namespace
}  // namespace ktt
