// What surrounds the matrix products, row by row: operands from activations, silu(gate) * up, the
// weighted sum over experts, the caller's type. Written in the vocabulary of an Isa.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "gemm.h"
#include "kernel_table.h"

namespace ktt {
namespace {

// e^v to about one unit in the last place: v = n * ln 2 + r with |r| <= ln 2 / 2, Taylor in r.
template <class Isa>
inline typename Isa::F32 exponential(typename Isa::F32 v) {
  using F32 = typename Isa::F32;
  const F32 x = Isa::clamp(v, -87.0f, 88.0f);
  const F32 n = Isa::round(Isa::mul(x, Isa::splat(1.44269504088896341f)));
  static constexpr float kInverseFactorials[] = {
      1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  F32 r = Isa::fma(n, Isa::splat(-0.693359375f), x);  // ln 2 in two parts, the first one short
  r = Isa::fma(n, Isa::splat(2.12194440054690583e-4f), r);
  F32 sum = Isa::splat(1.0f / 5040.0f);
  for (const float factor : kInverseFactorials) {
    sum = Isa::fma(sum, r, Isa::splat(factor));
  }
  return Isa::mul(sum, Isa::power_of_two(n));
}

template <class Isa>
inline typename Isa::F32 silu(typename Isa::F32 v) {
  const auto e = exponential<Isa>(Isa::mul(v, Isa::splat(-1.0f)));
  return Isa::div(v, Isa::add(Isa::splat(1.0f), e));
}

// How fp32 values are stored: as operands of the float modes, or as the caller's type.
struct AsFloat {
  using Element = float;
  template <class Isa>
  static inline void store(Element* p, typename Isa::F32 v) {
    Isa::store(p, v);
  }
};

// For instruction sets that multiply fp32 only: bfloat16's values, kept in fp32.
struct AsRoundedFloat {
  using Element = float;
  template <class Isa>
  static inline void store(Element* p, typename Isa::F32 v) {
    Isa::store(p, Isa::round_bf16(v));
  }
};

struct AsBfloat16 {
  using Element = uint16_t;
  template <class Isa>
  static inline void store(Element* p, typename Isa::F32 v) {
    Isa::store_bf16(p, v);
  }
};

template <class Isa>
inline typename Isa::F32 load_as_float(const float* p) {
  return Isa::load(p);
}
template <class Isa>
inline typename Isa::F32 load_as_float(const uint16_t* p) {
  return Isa::load_bf16(p);
}

// Rows of an odd number of cache lines do not compete for the same few sets of the first cache, as
// rows of 4096 bytes do. That is worth a copy of rows that are operands already.
constexpr size_t padded(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

template <class As>
size_t row_bytes(const Depth& depth) {
  return padded(depth.size * sizeof(typename As::Element));
}

template <class Isa, class Source, class As>
void convert(const void* source, const Depth& depth, void* operands) {
  const auto* from = static_cast<const Source*>(source);
  auto* to = static_cast<typename As::Element*>(operands);
  for (size_t i = 0; i < depth.size; i += Isa::kLanes) {
    As::template store<Isa>(to + i, load_as_float<Isa>(from + i));
  }
}

inline size_t int8_row_bytes(const Depth& depth) {
  return padded(Int8Row::sums_offset(depth) + depth.num_groups() * sizeof(int32_t));
}

// The largest size of a group's values, as bits: in this order a NaN is larger than any number.
template <class Isa, class Source>
inline float largest_of(const Source* from, size_t count) {
  auto largest = Isa::zero_bits();
  for (size_t i = 0; i < count; i += Isa::kLanes) {
    const auto bits = Isa::as_bits(load_as_float<Isa>(from + i));
    largest = Isa::max32(largest, Isa::bit_and(bits, Isa::splat32(0x7FFFFFFF)));
  }
  const int32_t bits = Isa::max_of(largest);
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class Isa, class Source>
inline int32_t store_scaled(const Source* from, size_t count, float factor, int8_t* to) {
  auto sum = Isa::zero_bits();
  for (size_t i = 0; i < count; i += Isa::kLanes) {
    const auto whole = Isa::to_int(Isa::mul(load_as_float<Isa>(from + i), Isa::splat(factor)));
    Isa::store_quads(to + i, whole);
    sum = Isa::add32(sum, whole);
  }
  return Isa::sum_of(sum);
}

// An int8 operand row: the largest value of a group becomes 127 or -127. A group with a value that
// is not finite has the scale NaN, and so have the results: they must not look plausible.
template <class Isa, class Source>
void quantize(const void* source, const Depth& depth, void* operands) {
  const auto* from = static_cast<const Source*>(source);
  auto* row = static_cast<std::byte*>(operands);
  auto* values = reinterpret_cast<int8_t*>(row);
  auto* scales = reinterpret_cast<float*>(row + Int8Row::scales_offset(depth));
  auto* sums = reinterpret_cast<int32_t*>(row + Int8Row::sums_offset(depth));
  size_t end = depth.first_group();
  for (size_t at = 0; at < depth.size; at = end, end += depth.group) {
    if (end > depth.size) end = depth.size;
    const float largest = largest_of<Isa>(from + at, end - at);
    const float scale = largest - largest == 0.0f ? largest / 127.0f : __builtin_nanf("");
    const float factor = scale > 0.0f ? 127.0f / largest : 0.0f;
    const int32_t sum = store_scaled<Isa>(from + at, end - at, factor, values + at);
    *scales++ = scale;
    *sums++ = scale == scale ? sum : 0;  // that of no numbers is so large that products overflow
  }
  for (size_t at = depth.size; at < Int8Row::values_bytes(depth); ++at) values[at] = 0;
}

template <class Isa, class As>
void swiglu(const float* sums, size_t num_rows, void* values, size_t row_stride_bytes) {
  for (size_t r = 0; r < num_rows; ++r) {
    auto* to =
        reinterpret_cast<typename As::Element*>(static_cast<char*>(values) + r * row_stride_bytes);
    const float* gate = sums + r * kPanelColumns;
    const float* up = gate + kTileColumns;
    for (size_t i = 0; i < kTileColumns; i += Isa::kLanes) {
      As::template store<Isa>(to + i, Isa::mul(silu<Isa>(Isa::load(gate + i)), Isa::load(up + i)));
    }
  }
}

template <class Isa>
void accumulate(const float* sums, const float* weights, const uint32_t* row_of, size_t num_rows,
                float* totals) {
  for (size_t r = 0; r < num_rows; ++r) {
    const auto weight = Isa::splat(weights[r]);
    float* total = totals + row_of[r] * kPanelColumns;
    for (size_t i = 0; i < kPanelColumns; i += Isa::kLanes) {
      const auto sum = Isa::load(sums + r * kPanelColumns + i);
      Isa::store(total + i, Isa::fma(weight, sum, Isa::load(total + i)));
    }
  }
}

template <class Isa, class As>
void finish(const float* totals, void* out) {
  auto* to = static_cast<typename As::Element*>(out);
  for (size_t i = 0; i < kPanelColumns; i += Isa::kLanes) {
    As::template store<Isa>(to + i, Isa::load(totals + i));
  }
}

template <class Isa, class As>
void finish_add(const float* totals, void* out) {
  auto* to = static_cast<typename As::Element*>(out);
  for (size_t i = 0; i < kPanelColumns; i += Isa::kLanes) {
    As::template store<Isa>(to + i, Isa::add(load_as_float<Isa>(to + i), Isa::load(totals + i)));
  }
}

// Denormal numbers count as zero while kernels run, as AMX and the bfloat16 dot product have it
// anyway: one numerical behaviour, and no slow path.
inline uint32_t enter_kernels() {
  const uint32_t before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u);  // flush to zero, denormals are zero
  return before;
}
inline void leave_kernels(uint32_t before) { _mm_setcsr(before); }

inline constexpr size_t kNoTiles = ~static_cast<size_t>(0);

using Multiply = void (*)(const BlockTask& task);

// Operands of a float mode; the caller says how they are multiplied with each format.
template <class Isa, class As>
constexpr ActivationKernels float_kernels(Multiply bf16, Multiply fp8, Multiply int8,
                                          Multiply int4) {
  return {.min_tile_rows = kNoTiles,
          .num_panels = kMaxPanels,
          .row_bytes = &row_bytes<As>,
          .multiply = {bf16, fp8, int8, int4},
          .convert = {&convert<Isa, float, As>, &convert<Isa, uint16_t, As>},
          .swiglu = &swiglu<Isa, As>,
          .value_bytes = sizeof(typename As::Element),
          .quantizes = false};
}

template <class Isa>
constexpr ActivationKernels int8_kernels(Multiply int8, Multiply int4) {
  return {.min_tile_rows = kNoTiles,
          .num_panels = kMaxPanels,
          .row_bytes = &int8_row_bytes,
          .multiply = {nullptr, nullptr, int8, int4},
          .convert = {&quantize<Isa, float>, &quantize<Isa, uint16_t>},
          .swiglu = &swiglu<Isa, AsFloat>,
          .value_bytes = sizeof(float),
          .quantizes = true};
}

// Vector kernels of the two float modes.
template <class Isa, class As>
constexpr ActivationKernels with_float_products() {
  using Products = FloatProducts<Isa>;
  return float_kernels<Isa, As>(&multiply<Products, FormatBf16>, &multiply<Products, FormatFp8>,
                                &multiply<Products, FormatInt8>, &multiply<Products, FormatInt4>);
}

template <class Isa>
constexpr ActivationKernels with_pair_products() {
  using Products = PairProducts<Isa>;
  return float_kernels<Isa, AsBfloat16>(
      &multiply<Products, FormatBf16>, &multiply<Products, FormatFp8>,
      &multiply<Products, FormatInt8>, &multiply<Products, FormatInt4>);
}

// And of int8, with the dot product of four bytes and without.
template <class Isa>
constexpr ActivationKernels with_dot_products() {
  return int8_kernels<Isa>(&multiply<DotProducts<Isa, FormatInt8>, FormatInt8>,
                           &multiply<DotProducts<Isa, FormatInt4>, FormatInt4>);
}

template <class Isa>
constexpr ActivationKernels with_byte_products() {
  return int8_kernels<Isa>(&multiply<SignProducts<Isa, FormatInt8>, FormatInt8>,
                           &multiply<NarrowProducts<Isa, FormatInt4>, FormatInt4>);
}

template <class Isa>
constexpr KernelTable kernel_table(const char* name, ActivationKernels float32,
                                   ActivationKernels bfloat16, ActivationKernels int8) {
  return {.name = name,
          .activation = {float32, bfloat16, int8},
          .accumulate = &accumulate<Isa>,
          .finish = {&finish<Isa, AsFloat>, &finish<Isa, AsBfloat16>},
          .finish_add = {&finish_add<Isa, AsFloat>, &finish_add<Isa, AsBfloat16>},
          .enter = &enter_kernels,
          .leave = &leave_kernels};
}

}  // namespace
}  // namespace ktt
