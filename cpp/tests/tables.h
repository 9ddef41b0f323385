// The kernel tables this machine can run, the software model of AMX among them, and fp8 and
// bfloat16 arithmetic written apart from the library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "kernels/kernel_table.h"
#include "weights.h"

namespace ktt {

const KernelTable& table_amx_emulated();

inline std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
  if (isa_granted(Isa::kAvx2)) tables.push_back(&table_avx2());
  if (isa_granted(Isa::kAvx512)) {
    tables.push_back(&table_avx512());
    tables.push_back(&table_amx_emulated());
    const KernelTable* best = dispatch(Isa::kAvx512).table;
    if (best != tables[1]) tables.push_back(best);
  }
  if (isa_granted(Isa::kAmx)) tables.push_back(&table_amx());
  return tables;
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rest = bits & 0xFFFF;
  uint32_t high = bits >> 16;
  if (rest > 0x8000 || (rest == 0x8000 && (high & 1) != 0)) ++high;
  return static_cast<uint16_t>(high);
}

inline double from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15;
  const int mantissa = code & 7;
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -size : size;
}

inline bool is_nan_e4m3(uint8_t code) { return (code & 0x7F) == 0x7F; }

// A matrix as a caller has it, and its values.
struct Matrix {
  std::vector<std::byte> stored;
  std::vector<float> scales;
  std::vector<double> values;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal(float width) { return std::normal_distribution<float>(0.0f, width)(engine_); }
  size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(engine_); }

  std::vector<float> normals(size_t count, float width) {
    std::vector<float> values(count);
    for (float& v : values) v = normal(width);
    return values;
  }

  Matrix matrix(size_t rows, size_t columns, WeightFormat format) {
    Matrix m;
    const float width = 1.0f / std::sqrt(static_cast<float>(columns));
    const size_t blocks = (columns + 127) / 128;
    if (format == WeightFormat::kFp8) {
      m.scales.resize((rows + 127) / 128 * blocks);
      for (float& scale : m.scales) scale = 0.01f * width * (1.0f + static_cast<float>(below(100)));
    }
    m.stored.resize(rows * columns * traits(format).element_bytes);
    for (size_t i = 0; i < rows * columns; ++i) {
      if (format == WeightFormat::kBf16) {
        const uint16_t bits = to_bf16(normal(width));
        std::memcpy(m.stored.data() + 2 * i, &bits, 2);
        m.values.push_back(from_bf16(bits));
      } else {
        uint8_t code = static_cast<uint8_t>(below(256));
        if ((code & 0x78) > 0x40) code &= 0xBF;  // keep sizes alike; NaN codes go with it
        m.stored[i] = std::byte{code};
        m.values.push_back(from_e4m3(code) *
                           double{m.scales[i / columns / 128 * blocks + i % columns / 128]});
      }
    }
    return m;
  }

 private:
  std::mt19937 engine_;
};

struct Expert {
  Matrix gate, up, down;

  ExpertSource source() const {
    const auto scales = [](const Matrix& m) {
      return m.scales.empty() ? nullptr : m.scales.data();
    };
    return {gate.stored.data(), up.stored.data(), down.stored.data(),
            scales(gate),       scales(up),       scales(down)};
  }
};

inline Expert random_expert(Random& random, size_t hidden, size_t inter, WeightFormat format) {
  return {random.matrix(inter, hidden, format), random.matrix(inter, hidden, format),
          random.matrix(hidden, inter, format)};
}

}  // namespace ktt
