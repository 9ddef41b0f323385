// The kernel tables this machine can run, those the test build adds among them, and random weights
// with their values, in arithmetic written apart from the library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/kernel_table.h"
#include "weights.h"

namespace ktt {

const KernelTable& table_amx_emulated();
const KernelTable& table_avx2_vnni_twin();

inline std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
  const auto add = [&tables](bool granted, const KernelTable& table) {
    if (granted) tables.push_back(&table);
  };
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 =
      vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  add(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), table_avx2_base());
  add(vnni, table_avx2_vnni_twin());
  add(avx512, table_avx512_base());
  add(vnni, table_avx512_vnni());
  add(bf16, table_avx512_bf16());
  add(bf16, table_amx_emulated());
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
  WeightFormat format;
  size_t columns;  // of a row
  size_t group;    // kChunkDepth for formats without groups
  std::vector<std::byte> stored;
  std::vector<std::byte> scales;
  std::vector<double> values;

  size_t row_bytes() const { return weight_bytes(format, columns); }
  size_t groups_per_row() const { return (columns + group - 1) / group; }

  void set_bits(size_t index, unsigned bits) {
    if (format == WeightFormat::kBf16) {
      const auto wide = static_cast<uint16_t>(bits);
      std::memcpy(stored.data() + 2 * index, &wide, 2);
    } else if (format == WeightFormat::kInt4) {
      auto& both = stored[index / 2];
      const int shift = static_cast<int>(4 * (index % 2));
      both = (both & ~(std::byte{15} << shift)) | std::byte{static_cast<uint8_t>(bits)} << shift;
    } else {
      stored[index] = std::byte{static_cast<uint8_t>(bits)};
    }
  }
  float scale(size_t row, size_t column) const {
    const size_t at = column / group;
    if (format == WeightFormat::kFp8) {
      float value;
      std::memcpy(&value, scales.data() + 4 * (row / 128 * groups_per_row() + at), 4);
      return value;
    }
    uint16_t bits = 0x3F80;
    if (!scales.empty()) std::memcpy(&bits, scales.data() + 2 * (row * groups_per_row() + at), 2);
    return from_bf16(bits);
  }
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

  Matrix matrix(size_t rows, size_t columns, WeightFormat format, size_t group = kChunkDepth) {
    Matrix m{format, columns, group, {}, {}, {}};
    m.stored.resize(rows * m.row_bytes());
    add_scales(m, rows);
    for (size_t i = 0; i < rows * columns; ++i) {
      const auto [bits, value] = weight(format, columns);
      m.set_bits(i, bits);
      m.values.push_back(value * double{m.scale(i / columns, i % columns)});
    }
    return m;
  }

 private:
  struct Weight {
    unsigned bits;
    double value;
  };

  Weight weight(WeightFormat format, size_t columns) {
    switch (format) {
      case WeightFormat::kBf16: {
        const uint16_t bits = to_bf16(normal(1.0f / std::sqrt(static_cast<float>(columns))));
        return {bits, from_bf16(bits)};
      }
      case WeightFormat::kFp8: {
        auto code = static_cast<uint8_t>(below(256));
        if ((code & 0x78) > 0x40) code &= 0xBF;  // keep sizes alike; NaN codes go with it
        return {code, from_e4m3(code)};
      }
      case WeightFormat::kInt8: {
        const int value = static_cast<int>(below(256)) - 128;
        return {static_cast<unsigned>(value & 255), static_cast<double>(value)};
      }
      default: {
        const auto bits = static_cast<unsigned>(below(16));
        return {bits, static_cast<double>(bits) - 8.0};
      }
    }
  }

  void add_scales(Matrix& m, size_t rows) {
    const float unit = 0.01f / std::sqrt(static_cast<float>(m.columns));
    const auto draw = [&] { return unit * static_cast<float>(1 + below(100)); };
    if (m.format == WeightFormat::kFp8) {
      for (size_t i = 0; i < (rows + 127) / 128 * m.groups_per_row(); ++i) append(m.scales, draw());
    } else if (m.format != WeightFormat::kBf16) {
      for (size_t i = 0; i < rows * m.groups_per_row(); ++i) append(m.scales, to_bf16(draw()));
    }
  }

  template <class T>
  static void append(std::vector<std::byte>& bytes, T value) {
    bytes.resize(bytes.size() + sizeof(value));
    std::memcpy(bytes.data() + bytes.size() - sizeof(value), &value, sizeof(value));
  }

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

inline Expert random_expert(Random& random, size_t hidden, size_t inter, WeightFormat format,
                            size_t group = kChunkDepth) {
  return {random.matrix(inter, hidden, format, group), random.matrix(inter, hidden, format, group),
          random.matrix(hidden, inter, format, group)};
}

}  // namespace ktt
