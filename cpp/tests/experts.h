// Random experts in every format and what they compute, in double and apart from the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "weights.h"

namespace ktt {

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

// A matrix as a caller has it, and its values.
struct Matrix {
  std::vector<std::byte> stored;
  std::vector<std::byte> scales;
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

  Matrix matrix(size_t rows, size_t columns, WeightFormat format, size_t group) {
    width_ = 1.0f / std::sqrt(static_cast<float>(columns));
    switch (traits(format).scales) {
      case Scales::kNone:
        return plain(rows, columns);
      case Scales::kSquares:
        return squares(rows, columns);
      case Scales::kGroups:
        break;
    }
    return groups(rows, columns, format, group);
  }

 private:
  template <class T>
  static void append(std::vector<std::byte>& bytes, T value) {
    const auto* from = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof(T));
  }

  Matrix plain(size_t rows, size_t columns) {
    Matrix m;
    for (size_t i = 0; i < rows * columns; ++i) {
      const uint16_t bits = to_bf16(normal(width_));
      append(m.stored, bits);
      m.values.push_back(from_bf16(bits));
    }
    return m;
  }

  Matrix squares(size_t rows, size_t columns) {
    Matrix m;
    const size_t across = (columns + 127) / 128;
    std::vector<float> scales((rows + 127) / 128 * across);
    for (float& scale : scales) {
      scale = 0.01f * width_ * (1.0f + static_cast<float>(below(100)));
      append(m.scales, scale);
    }
    for (size_t i = 0; i < rows * columns; ++i) {
      uint8_t code = static_cast<uint8_t>(below(256));
      if ((code & 0x78) > 0x40) code &= 0xBF;  // keep sizes alike; NaN codes go with it
      append(m.stored, code);
      m.values.push_back(from_e4m3(code) *
                         double{scales[i / columns / 128 * across + i % columns / 128]});
    }
    return m;
  }

  Matrix groups(size_t rows, size_t columns, WeightFormat format, size_t group) {
    Matrix m;
    const bool is_int4 = format == WeightFormat::kInt4;
    const int most = is_int4 ? 8 : 127;
    int before = 0;
    float scale = 0.0f;
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < columns; ++c) {
        if (c % group == 0) {
          const uint16_t bits =
              to_bf16(width_ * (1.0f + static_cast<float>(below(100)) / 50.0f) / float(most));
          scale = from_bf16(bits);
          append(m.scales, bits);
        }
        const int value = static_cast<int>(below(2 * most)) - (is_int4 ? most : most - 1);
        m.values.push_back(value * double{scale});
        if (!is_int4) append(m.stored, static_cast<int8_t>(value));
        if (is_int4 && c % 2 == 1) {
          append(m.stored, static_cast<uint8_t>(before + 8 + (value + 8) * 16));
        }
        before = value;
      }
    }
    return m;
  }

  std::mt19937 engine_;
  float width_ = 1.0f;
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

  // What the expert makes of one token.
  std::vector<double> operator()(const std::vector<double>& x) const {
    const size_t inter = gate.values.size() / x.size();
    std::vector<double> middle(inter);
    for (size_t i = 0; i < inter; ++i) {
      const double v = dot(gate.values, i, x);
      middle[i] = v / (1.0 + std::exp(-v)) * dot(up.values, i, x);
    }
    std::vector<double> out(x.size());
    for (size_t h = 0; h < x.size(); ++h) out[h] = dot(down.values, h, middle);
    return out;
  }

 private:
  static double dot(const std::vector<double>& matrix, size_t row, const std::vector<double>& v) {
    double sum = 0.0;
    for (size_t i = 0; i < v.size(); ++i) sum += matrix[row * v.size() + i] * v[i];
    return sum;
  }
};

inline Expert random_expert(Random& random, const LayerShape& shape) {
  const size_t hidden = shape.hidden_size;
  const size_t inter = shape.intermediate_size;
  return {random.matrix(inter, hidden, shape.format, shape.group),
          random.matrix(inter, hidden, shape.format, shape.group),
          random.matrix(hidden, inter, shape.format, shape.group)};
}

}  // namespace ktt
