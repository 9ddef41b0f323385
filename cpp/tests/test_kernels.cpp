// Every runnable kernel table against plain arithmetic: panels of all formats and modes, exact
// weights one by one, int8 operands, and that a row's sums never depend on what it is computed
// with.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "check.h"
#include "tables.h"

namespace ktt {
namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kBf16, WeightFormat::kFp8, WeightFormat::kInt8,
                                     WeightFormat::kInt4};
constexpr Activation kFloatModes[] = {Activation::kFloat32, Activation::kBfloat16};
constexpr Activation kModes[] = {Activation::kFloat32, Activation::kBfloat16, Activation::kInt8};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

bool has_groups(WeightFormat format) { return traits(format).scales == Scales::kGroups; }

class Scope {
 public:
  explicit Scope(const KernelTable& table) : table_(table), state_(table.enter()) {}
  ~Scope() { table_.leave(state_); }

 private:
  const KernelTable& table_;
  uint32_t state_;
};

const ActivationKernels& kernels_of(const KernelTable& table, Activation mode) {
  return table.activation[static_cast<size_t>(mode)];
}

// Rows of fp32 as operands of a mode.
struct Operands {
  Operands(const KernelTable& table, Activation mode, const std::vector<float>& x,
           const Depth& depth)
      : mode(mode), depth(depth), stride(kernels_of(table, mode).row_bytes(depth)) {
    const size_t rows = x.size() / depth.size;
    bytes.resize(rows * stride);
    const auto convert = kernels_of(table, mode).convert[0];
    const Scope scope(table);
    for (size_t r = 0; r < rows; ++r) {
      std::byte* to = bytes.data() + r * stride;
      convert(x.data() + r * depth.size, depth, to);
      pointers.push_back(to);
    }
  }

  template <class T>
  T at(size_t row, size_t offset, size_t index) const {
    T value;
    std::memcpy(&value, bytes.data() + row * stride + offset + index * sizeof(T), sizeof(T));
    return value;
  }
  size_t group_of(size_t k) const {
    return (depth.begin + k) / depth.group - depth.begin / depth.group;
  }
  // What an int8 row stands for at depth k.
  double int8_value(size_t row, size_t k) const {
    constexpr size_t kQuadOrder[] = {0, 2, 1, 3};
    const auto value = at<int8_t>(row, 0, k / 4 * 4 + kQuadOrder[k % 4]);
    return double{at<float>(row, Int8Row::scales_offset(depth), group_of(k))} * value;
  }

  Activation mode;
  Depth depth;
  size_t stride;
  std::vector<std::byte> bytes;
  std::vector<const void*> pointers;
};

// Two panels of a matrix of 64 rows, cut in depth.
struct Panels {
  static constexpr size_t kCount = 2;

  Panels(const Matrix& matrix, const Depth& depth)
      : format(matrix.format),
        depth(depth),
        panel_bytes(ktt::panel_bytes(format, depth.size)),
        scale_bytes(panel_scale_bytes(format, depth)),
        weights(kCount * panel_bytes),
        scales(kCount * scale_bytes) {
    for (size_t panel = 0; panel < kCount; ++panel) {
      const auto* row = matrix.stored.data() + panel * kPanelColumns * matrix.row_bytes();
      const auto* at = row + weight_bytes(format, depth.begin);
      const PanelSource source{{at, at + kTileColumns * matrix.row_bytes()}, matrix.row_bytes()};
      pack_panel(format, source, depth, weights.data() + panel * panel_bytes);
      pack_scales(matrix, panel);
    }
  }

  void pack_scales(const Matrix& matrix, size_t panel) {
    std::byte* to = scales.data() + panel * scale_bytes;
    const bool squares = format == WeightFormat::kFp8;
    if (!squares && !has_groups(format)) return;
    for (size_t group = 0; group < depth.num_groups(); ++group) {
      const size_t column = (depth.begin / depth.group + group) * depth.group;
      for (size_t c = 0; c < kPanelColumns; c += squares ? kTileColumns : 1) {
        const float scale = matrix.scale(panel * kPanelColumns + c, column);
        const uint16_t half = to_bf16(scale);
        std::memcpy(to, squares ? static_cast<const void*>(&scale) : &half, squares ? 4 : 2);
        to += squares ? 4 : 2;
      }
    }
  }

  WeightFormat format;
  Depth depth;
  size_t panel_bytes;
  size_t scale_bytes;
  std::vector<std::byte> weights;
  std::vector<std::byte> scales;
};

std::vector<float> multiply(const KernelTable& table, const Panels& panels,
                            const Operands& operands, size_t first, size_t num_rows,
                            size_t first_panel, size_t num_panels, bool contiguous) {
  const Scope scope(table);
  std::vector<float> sums(num_panels * num_rows * kPanelColumns, kNan);
  alignas(64) static std::byte decode[kDecodeBytes];
  kernels_of(table, operands.mode)
      .multiply[static_cast<size_t>(panels.format)](
          {.rows = operands.pointers.data() + first,
           .row_stride = contiguous ? operands.stride : 0,
           .num_rows = num_rows,
           .weights = panels.weights.data() + first_panel * panels.panel_bytes,
           .panel_bytes = panels.panel_bytes,
           .scales = panels.scales.data() + first_panel * panels.scale_bytes,
           .panel_scale_bytes = panels.scale_bytes,
           .num_panels = num_panels,
           .depth = panels.depth,
           .sums = sums.data(),
           .decode = decode});
  return sums;
}

double operand_value(const Operands& operands, size_t row, size_t k, float x) {
  if (operands.mode == Activation::kInt8) return operands.int8_value(row, k);
  return operands.mode == Activation::kFloat32 ? x : from_bf16(to_bf16(x));
}

// All rows and both panels against sums in double precision.
void check_values(const Matrix& matrix, const Operands& operands, const std::vector<float>& x,
                  const std::vector<float>& sums) {
  const Depth& depth = operands.depth;
  const size_t rows = operands.pointers.size();
  std::vector<double> row(depth.size);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < depth.size; ++k) {
      row[k] = operand_value(operands, r, k, x[r * depth.size + k]);
    }
    for (size_t c = 0; c < Panels::kCount * kPanelColumns; ++c) {
      const double* weights = matrix.values.data() + c * matrix.columns + depth.begin;
      double wanted = 0.0;
      double size = 0.0;
      for (size_t k = 0; k < depth.size; ++k) {
        wanted += weights[k] * row[k];
        size += std::abs(weights[k] * row[k]);
      }
      const size_t panel = c / kPanelColumns;
      const float sum = sums[(panel * rows + r) * kPanelColumns + c % kPanelColumns];
      CHECK(std::abs(sum - wanted) <= 1e-6 * size);
    }
  }
}

// Some rows of one panel alone must come out as they did with all others.
void check_independence(const KernelTable& table, const Panels& panels, const Operands& operands,
                        const std::vector<float>& sums) {
  const size_t rows = operands.pointers.size();
  for (size_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 33}) {
    const size_t first = (count * 5) % (rows - count);
    const size_t panel = count % Panels::kCount;
    const auto some = multiply(table, panels, operands, first, count, panel, 1, count % 4 < 2);
    const size_t at = (panel * rows + first) * kPanelColumns;
    CHECK(std::equal(some.begin(), some.end(), sums.begin() + static_cast<ptrdiff_t>(at)));
  }
}

void check_panels(const KernelTable& table, Activation mode, WeightFormat format, size_t columns,
                  const Depth& depth) {
  constexpr size_t kRows = 70;
  Random random(7);
  const Matrix matrix = random.matrix(Panels::kCount * kPanelColumns, columns, format, depth.group);
  const Panels panels(matrix, depth);
  const auto x = random.normals(kRows * depth.size, 1.0f);
  const Operands operands(table, mode, x, depth);
  const auto sums = multiply(table, panels, operands, 0, kRows, 0, Panels::kCount, true);
  check_values(matrix, operands, x, sums);
  check_independence(table, panels, operands, sums);
}

void check_all_cuts(const KernelTable& table, Activation mode, WeightFormat format) {
  for (const size_t group : {32, 64, 128}) {
    if (!has_groups(format) && group != kChunkDepth) continue;
    check_panels(table, mode, format, 32, {32, 0, group});
    check_panels(table, mode, format, 256, {256, 0, group});
    check_panels(table, mode, format, 416, {416, 0, group});
    check_panels(table, mode, format, 416, {192, 96, group});  // chunks cut at both ends
    check_panels(table, mode, format, 416, {32, 64, group});   // less than one
  }
}

TEST(panels_are_right_and_rows_independent) {
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : kModes) {
      for (const WeightFormat format : kFormats) {
        const auto& kernels = kernels_of(*table, mode);
        const bool offered = kernels.multiply[static_cast<size_t>(format)] != nullptr;
        CHECK_EQUAL(offered, mode != Activation::kInt8 || has_groups(format));
        if (offered) check_all_cuts(*table, mode, format);
      }
    }
  }
}

TEST(long_depths) {
  for (const KernelTable* table : runnable_tables()) {
    check_panels(*table, Activation::kBfloat16, WeightFormat::kBf16, 2144, {2144, 0, kChunkDepth});
    check_panels(*table, Activation::kInt8, WeightFormat::kInt4, 2144, {2144, 0, 64});
  }
}

// Every code of a format, with a scale that is a power of two, as weights of unit vectors.
void check_codes(const KernelTable& table, Activation mode, WeightFormat format) {
  constexpr size_t kSize = 64;
  const Depth depth{kSize, 0, kChunkDepth};
  Random random(1);
  Matrix matrix = random.matrix(kSize, kSize, format);
  const unsigned num_codes = 1u << (format == WeightFormat::kInt4 ? 4 : 8);
  std::vector<double> wanted;
  for (size_t i = 0; i < kSize * kSize; ++i) {
    auto code = static_cast<unsigned>(i + i / num_codes) % num_codes;
    if (format == WeightFormat::kFp8 && is_nan_e4m3(static_cast<uint8_t>(code))) code = 0;
    matrix.set_bits(i, code);
    wanted.push_back(0.5 * (format == WeightFormat::kFp8    ? from_e4m3(static_cast<uint8_t>(code))
                            : format == WeightFormat::kInt8 ? static_cast<int8_t>(code)
                                                            : static_cast<int>(code) - 8));
  }
  const float half = 0.5f;
  const uint16_t half16 = to_bf16(half);
  if (format == WeightFormat::kFp8) {
    std::memcpy(matrix.scales.data(), &half, 4);
  } else {
    for (size_t i = 0; i < kSize; ++i) std::memcpy(matrix.scales.data() + 2 * i, &half16, 2);
  }
  std::vector<float> unit(kSize * kSize, 0.0f);
  for (size_t i = 0; i < kSize; ++i) unit[i * kSize + i] = 127.0f;  // int8's scale is then 1
  const Panels panels(matrix, depth);
  const Operands operands(table, mode, unit, depth);
  for (const size_t count : {size_t{1}, kSize}) {  // decoded on the fly, decoded beforehand
    for (size_t first = 0; first < kSize; first += count) {
      const auto sums = multiply(table, panels, operands, first, count, 0, Panels::kCount, true);
      for (size_t i = 0; i < sums.size(); ++i) {
        const size_t column = i / (count * kPanelColumns) * kPanelColumns + i % kPanelColumns;
        const size_t k = first + i / kPanelColumns % count;
        CHECK_EQUAL(double{sums[i]}, 127.0 * wanted[column * kSize + k]);
      }
    }
  }
}

TEST(every_code_is_exact) {
  for (const KernelTable* table : runnable_tables()) {
    for (const WeightFormat format :
         {WeightFormat::kFp8, WeightFormat::kInt8, WeightFormat::kInt4}) {
      for (const Activation mode : kFloatModes) check_codes(*table, mode, format);
      if (has_groups(format)) check_codes(*table, Activation::kInt8, format);
    }
  }
}

// The largest sums there are must fit wherever kernels keep them meanwhile.
TEST(extreme_int8_values_do_not_overflow) {
  const Depth depth{256, 0, kChunkDepth};
  for (const KernelTable* table : runnable_tables()) {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      for (const unsigned code : {0u, 15u, 127u, 128u}) {
        Random random(2);
        Matrix matrix = random.matrix(64, depth.size, format);
        for (size_t i = 0; i < matrix.values.size(); ++i)
          matrix.set_bits(i, code & (format == WeightFormat::kInt4 ? 15u : 255u));
        for (size_t i = 0; i < matrix.values.size(); ++i) {
          const double weight = format == WeightFormat::kInt8 ? static_cast<int8_t>(code)
                                                              : static_cast<int>(code & 15u) - 8;
          matrix.values[i] = weight * double{matrix.scale(i / depth.size, i % depth.size)};
        }
        std::vector<float> x(32 * depth.size, 3.0f);
        for (size_t i = 0; i < 16 * depth.size; ++i) x[i] = -3.0f;
        const Panels panels(matrix, depth);
        const Operands operands(*table, Activation::kInt8, x, depth);
        check_values(matrix, operands, x, multiply(*table, panels, operands, 0, 32, 0, 2, true));
      }
    }
  }
}

TEST(int8_operands_are_nearest_with_scale_and_sum) {
  const Depth depth{288, 32, 64};  // groups of 32, 64, 64, 64, 64
  Random random(6);
  auto x = random.normals(depth.size, 2.0f);
  std::fill(x.begin() + 32, x.begin() + 96, 0.0f);
  x[100] = 1e-38f;
  for (const KernelTable* table : runnable_tables()) {
    const Operands operands(*table, Activation::kInt8, x, depth);
    std::vector<float> largest(depth.num_groups(), 0.0f);
    std::vector<int> sums(depth.num_groups(), 0);
    for (size_t k = 0; k < depth.size; ++k) {
      float& most = largest[operands.group_of(k)];
      most = std::max(most, std::abs(x[k]));
    }
    for (size_t k = 0; k < depth.size; ++k) {
      const float most = largest[operands.group_of(k)];
      const float factor = most == 0.0f ? 0.0f : 127.0f / most;
      const auto wanted = static_cast<int>(std::nearbyint(x[k] * factor));
      constexpr size_t kQuadOrder[] = {0, 2, 1, 3};
      CHECK_EQUAL(int{operands.at<int8_t>(0, 0, k / 4 * 4 + kQuadOrder[k % 4])}, wanted);
      sums[operands.group_of(k)] += wanted;
    }
    for (size_t k = depth.size; k < Int8Row::values_bytes(depth); ++k) {
      CHECK_EQUAL(int{operands.at<int8_t>(0, 0, k)}, 0);
    }
    for (size_t g = 0; g < depth.num_groups(); ++g) {
      CHECK_EQUAL(operands.at<float>(0, Int8Row::scales_offset(depth), g), largest[g] / 127.0f);
      CHECK_EQUAL(operands.at<int32_t>(0, Int8Row::sums_offset(depth), g), sums[g]);
    }
  }
}

TEST(int8_operands_that_are_not_finite_make_nan) {
  const Depth depth{256, 0, 128};
  Random random(8);
  const Matrix matrix = random.matrix(64, depth.size, WeightFormat::kInt8);
  const Panels panels(matrix, depth);
  for (const float bad : {kNan, -kNan, std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    auto x = random.normals(2 * depth.size, 1.0f);
    x[depth.size + 77] = bad;
    for (const KernelTable* table : runnable_tables()) {
      const Operands operands(*table, Activation::kInt8, x, depth);
      CHECK_EQUAL(operands.at<int32_t>(1, Int8Row::sums_offset(depth), 0), 0);
      const auto sums = multiply(*table, panels, operands, 0, 2, 0, 1, true);
      for (size_t i = 0; i < sums.size(); ++i) CHECK_EQUAL(std::isnan(sums[i]), i >= kPanelColumns);
    }
  }
}

TEST(int8_operands_of_tiny_values_are_zero) {
  const Depth depth{32, 0, 32};
  std::vector<float> x(depth.size, 1e-37f);  // its scale would be a denormal number
  for (const KernelTable* table : runnable_tables()) {
    const Operands operands(*table, Activation::kInt8, x, depth);
    CHECK_EQUAL(operands.at<float>(0, Int8Row::scales_offset(depth), 0), 0.0f);
    for (size_t k = 0; k < depth.size; ++k) CHECK_EQUAL(int{operands.at<int8_t>(0, 0, k)}, 0);
  }
}

TEST(swiglu_is_accurate_over_the_whole_range) {
  std::vector<float> sums;
  for (float gate = -120.0f; gate <= 120.0f; gate += 0.0731f) {
    for (size_t i = 0; i < kTileColumns; ++i) sums.push_back(gate + 0.004f * static_cast<float>(i));
    for (size_t i = 0; i < kTileColumns; ++i) sums.push_back(1.25f);
  }
  const size_t rows = sums.size() / kPanelColumns;
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : {Activation::kFloat32, Activation::kInt8}) {
      std::vector<float> out(rows * kTileColumns);
      const Scope scope(*table);
      kernels_of(*table, mode).swiglu(sums.data(), rows, out.data(), kTileColumns * sizeof(float));
      for (size_t i = 0; i < out.size(); ++i) {
        const double gate = sums[i / kTileColumns * kPanelColumns + i % kTileColumns];
        const double wanted = 1.25 * gate / (1.0 + std::exp(-gate));
        CHECK(std::abs(out[i] - wanted) <= 4e-7 * std::abs(wanted) + 1e-35);
      }
    }
  }
}

TEST(swiglu_keeps_nan) {
  std::vector<float> sums(kPanelColumns, 1.0f);
  sums[3] = kNan;
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : kModes) {
      const auto& kernels = kernels_of(*table, mode);
      CHECK_EQUAL(kernels.quantizes, mode == Activation::kInt8);
      std::vector<std::byte> out(kTileColumns * kernels.value_bytes);
      const Scope scope(*table);
      kernels.swiglu(sums.data(), 1, out.data(), out.size());
      for (size_t i = 0; i < kTileColumns; ++i) {
        float value;
        if (kernels.value_bytes == 2) {
          uint16_t bits;
          std::memcpy(&bits, out.data() + 2 * i, 2);
          value = from_bf16(bits);
        } else {
          std::memcpy(&value, out.data() + 4 * i, 4);
        }
        CHECK_EQUAL(std::isnan(value), i == 3);
      }
    }
  }
}

TEST(bfloat16_rounds_to_nearest_even) {
  Random random(3);
  auto values = random.normals(4096, 3.0f);
  values[0] = from_bf16(0x3F80) + 0.00390625f;    // a tie: down to even
  values[1] = from_bf16(0x3F81) + 0.00390625f;    // a tie: up to even
  values[2] = std::numeric_limits<float>::max();  // up to infinity
  values[3] = -std::numeric_limits<float>::infinity();
  for (const KernelTable* table : runnable_tables()) {
    const Scope scope(*table);
    std::vector<uint16_t> out(values.size());
    for (size_t i = 0; i < values.size(); i += kPanelColumns) {
      table->finish[static_cast<size_t>(Dtype::kBfloat16)](values.data() + i, out.data() + i);
    }
    for (size_t i = 0; i < values.size(); ++i) CHECK_EQUAL(out[i], to_bf16(values[i]));
    std::vector<float> nan(kPanelColumns, kNan);
    const uint32_t all_ones = 0x7FFFFFFF;
    std::memcpy(nan.data() + 1, &all_ones, sizeof(all_ones));
    table->finish[static_cast<size_t>(Dtype::kBfloat16)](nan.data(), out.data());
    for (size_t i = 0; i < kPanelColumns; ++i) CHECK(std::isnan(from_bf16(out[i])));
  }
}

TEST(finish_add_adds_to_what_is_there) {
  Random random(9);
  const auto totals = random.normals(kPanelColumns, 1.0f);
  for (const KernelTable* table : runnable_tables()) {
    const Scope scope(*table);
    std::vector<float> floats(kPanelColumns, 0.75f);
    std::vector<uint16_t> halves(kPanelColumns, to_bf16(0.75f));
    table->finish_add[static_cast<size_t>(Dtype::kFloat32)](totals.data(), floats.data());
    table->finish_add[static_cast<size_t>(Dtype::kBfloat16)](totals.data(), halves.data());
    for (size_t i = 0; i < kPanelColumns; ++i) {
      CHECK_EQUAL(floats[i], 0.75f + totals[i]);
      CHECK_EQUAL(halves[i], to_bf16(0.75f + totals[i]));
    }
  }
}

TEST(conversions_of_both_types) {
  Random random(4);
  const Depth depth{64, 0, kChunkDepth};
  const auto values = random.normals(depth.size, 1.0f);
  std::vector<uint16_t> halves;
  for (const float v : values) halves.push_back(to_bf16(v));
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : kFloatModes) {
      const auto& kernels = kernels_of(*table, mode);
      const bool to_half = kernels.value_bytes == 2;
      const Scope scope(*table);
      for (const bool from_half : {false, true}) {
        std::vector<float> floats(depth.size);
        std::vector<uint16_t> bits(depth.size);
        kernels.convert[from_half ? 1 : 0](
            from_half ? static_cast<const void*>(halves.data()) : values.data(), depth,
            to_half ? static_cast<void*>(bits.data()) : floats.data());
        for (size_t i = 0; i < depth.size; ++i) {
          const bool rounds = from_half || mode == Activation::kBfloat16;
          const float wanted = rounds ? from_bf16(halves[i]) : values[i];
          CHECK_EQUAL(to_half ? from_bf16(bits[i]) : floats[i], wanted);
        }
      }
    }
  }
}

TEST(rows_do_not_compete_for_cache_sets) {
  for (const KernelTable* table : runnable_tables()) {
    for (const Activation mode : kModes) {
      for (const size_t size : {32, 2048, 7168}) {
        const auto& kernels = kernels_of(*table, mode);
        const size_t bytes = kernels.row_bytes({size, 0, kChunkDepth});
        CHECK(bytes >= size * kernels.value_bytes || kernels.quantizes);
        CHECK_EQUAL(bytes % 128, size_t{64});
      }
    }
  }
}

TEST(int8_rows_of_both_types_agree) {
  Random random(10);
  const Depth depth{160, 0, 64};
  auto values = random.normals(depth.size, 1.0f);
  std::vector<uint16_t> halves;
  for (float& v : values) {
    halves.push_back(to_bf16(v));
    v = from_bf16(halves.back());
  }
  for (const KernelTable* table : runnable_tables()) {
    const auto& kernels = kernels_of(*table, Activation::kInt8);
    std::vector<std::byte> rows[2] = {std::vector<std::byte>(kernels.row_bytes(depth)),
                                      std::vector<std::byte>(kernels.row_bytes(depth))};
    const Scope scope(*table);
    kernels.convert[static_cast<size_t>(Dtype::kFloat32)](values.data(), depth, rows[0].data());
    kernels.convert[static_cast<size_t>(Dtype::kBfloat16)](halves.data(), depth, rows[1].data());
    CHECK(rows[0] == rows[1]);
  }
}

TEST(accumulate_adds_rows_to_their_tokens) {
  Random random(5);
  const auto sums = random.normals(3 * kPanelColumns, 1.0f);
  const float weights[] = {0.5f, 2.0f, -1.0f};
  const uint32_t row_of[] = {1, 0, 1};
  for (const KernelTable* table : runnable_tables()) {
    const Scope scope(*table);
    std::vector<float> totals(2 * kPanelColumns, 1.0f);
    table->accumulate(sums.data(), weights, row_of, 3, totals.data());
    for (size_t c = 0; c < kPanelColumns; ++c) {
      CHECK_EQUAL(totals[c], std::fma(2.0f, sums[kPanelColumns + c], 1.0f));
      CHECK_EQUAL(totals[kPanelColumns + c],
                  std::fma(-1.0f, sums[2 * kPanelColumns + c], std::fma(0.5f, sums[c], 1.0f)));
    }
  }
}

// Denormal numbers are zero inside only; the caller's arithmetic is as it was.
TEST(floating_point_state_is_given_back) {
  volatile float tiny = std::numeric_limits<float>::min();
  for (const KernelTable* table : runnable_tables()) {
    {
      const Scope scope(*table);
      CHECK_EQUAL(tiny * 0.5f, 0.0f);
    }
    CHECK(tiny * 0.5f > 0.0f);
  }
}

}  // namespace
}  // namespace ktt
