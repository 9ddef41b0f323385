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

// How fp32 values become operands of the matrix products; kIsOperand says which of the caller's
// types need no conversion: float, bfloat16.
struct AsFloat {
  using Element = float;
  static constexpr bool kIsOperand[kNumDtypes] = {true, false};
  template <class Isa>
  static inline void store(Element* p, typename Isa::F32 v) {
    Isa::store(p, v);
  }
};

// For instruction sets that multiply fp32 only: bfloat16's values, kept in fp32.
struct AsRoundedFloat {
  using Element = float;
  static constexpr bool kIsOperand[kNumDtypes] = {false, false};
  template <class Isa>
  static inline void store(Element* p, typename Isa::F32 v) {
    Isa::store(p, Isa::round_bf16(v));
  }
};

struct AsBfloat16 {
  using Element = uint16_t;
  static constexpr bool kIsOperand[kNumDtypes] = {false, true};
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

template <class Isa, class Source, class As>
void convert(const void* source, size_t count, void* operands) {
  const auto* from = static_cast<const Source*>(source);
  auto* to = static_cast<typename As::Element*>(operands);
  for (size_t i = 0; i < count; i += Isa::kLanes) {
    As::template store<Isa>(to + i, load_as_float<Isa>(from + i));
  }
}

template <class Isa, class As>
void swiglu(const float* sums, size_t num_rows, void* operands, size_t row_stride_bytes) {
  for (size_t r = 0; r < num_rows; ++r) {
    auto* to = reinterpret_cast<typename As::Element*>(static_cast<char*>(operands) +
                                                       r * row_stride_bytes);
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
  convert<Isa, float, As>(totals, kPanelColumns, out);
}

// Denormal numbers count as zero while kernels run, as AMX and the bfloat16 dot product have it
// anyway: one numerical behaviour, and no slow path.
inline uint32_t enter_kernels() {
  const uint32_t before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u);  // flush to zero, denormals are zero
  return before;
}
inline void leave_kernels(uint32_t before) { _mm_setcsr(before); }

template <class Isa, class Rows, class As>
constexpr ActivationKernels activation_kernels(size_t min_tile_rows) {
  return {sizeof(typename As::Element),
          min_tile_rows,
          {&panel<Rows, FormatBf16>, &panel<Rows, FormatFp8>},
          {As::kIsOperand[0] ? nullptr : &convert<Isa, float, As>,
           As::kIsOperand[1] ? nullptr : &convert<Isa, uint16_t, As>},
          &swiglu<Isa, As>};
}

template <class Isa>
constexpr KernelTable kernel_table(const char* name, ActivationKernels exact,
                                   ActivationKernels fast) {
  return {name,
          {exact, fast},
          &accumulate<Isa>,
          {&finish<Isa, AsFloat>, &finish<Isa, AsBfloat16>},
          &enter_kernels,
          &leave_kernels};
}

inline constexpr size_t kNoTiles = ~static_cast<size_t>(0);

}  // namespace
}  // namespace ktt
