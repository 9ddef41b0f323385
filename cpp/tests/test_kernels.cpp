// Every runnable kernel table against plain arithmetic: panels of all formats and modes, exact fp8
// values, and that a row's sums never depend on the rows it is computed with.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "check.h"
#include "tables.h"

namespace ktt {
namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kBf16, WeightFormat::kFp8};
constexpr Dtype kModes[] = {Dtype::kFloat32, Dtype::kBfloat16};

class Scope {
 public:
  explicit Scope(const KernelTable& table) : table_(table), state_(table.enter()) {}
  ~Scope() { table_.leave(state_); }

 private:
  const KernelTable& table_;
  uint32_t state_;
};

const ActivationKernels& kernels_of(const KernelTable& table, Dtype mode) {
  return table.activation[static_cast<size_t>(mode)];
}

// Rows of fp32 as operands of a mode, padded as tile kernels ask for.
struct Operands {
  Operands(const KernelTable& table, Dtype mode, const std::vector<float>& x, size_t rows,
           size_t depth) {
    const auto& kernels = kernels_of(table, mode);
    stride = depth * kernels.operand_bytes;
    bytes.resize((rows + kRowPadding) * stride);
    const auto convert = kernels.convert[0];
    for (size_t r = 0; r < rows; ++r) {
      std::byte* to = bytes.data() + r * stride;
      if (convert == nullptr) {
        std::memcpy(to, x.data() + r * depth, stride);
      } else {
        convert(x.data() + r * depth, depth, to);
      }
      pointers.push_back(to);
    }
  }
  size_t stride;
  std::vector<std::byte> bytes;
  std::vector<const void*> pointers;
};

std::vector<float> multiply(const KernelTable& table, Dtype mode, WeightFormat format,
                            const ExpertSlice::Panel& panel, const Operands& operands, size_t first,
                            size_t num_rows, bool contiguous) {
  const Scope scope(table);
  std::vector<float> sums(num_rows * kPanelColumns, std::numeric_limits<float>::quiet_NaN());
  std::vector<uint16_t> decode(kDecodeElements);
  kernels_of(table, mode)
      .panel[static_cast<size_t>(format)]({operands.pointers.data() + first,
                                           contiguous ? operands.stride : 0, num_rows,
                                           panel.weights, panel.scales, panel.depth,
                                           panel.first_block, sums.data(), decode.data()});
  return sums;
}

// An expert whose down matrix is the one under test: panel p holds its rows 32p to 32p + 31.
struct DownMatrix {
  DownMatrix(Random& random, size_t rows, size_t depth, WeightFormat format, size_t begin,
             size_t width)
      : expert(random_expert(random, rows, depth, format)),
        slice({1, rows, depth, format}, begin, width, -1) {
    for (size_t i = 0; i < slice.num_panels(); ++i) slice.pack_panel(0, i, expert.source());
  }
  Expert expert;
  ExpertSlice slice;
};

double operand_value(Dtype mode, float x) {
  return mode == Dtype::kFloat32 ? x : from_bf16(to_bf16(x));
}

void check_panels(const KernelTable& table, Dtype mode, WeightFormat format, size_t depth,
                  size_t begin, size_t width) {
  constexpr size_t kRows = 70;
  constexpr size_t kOutputs = 64;
  Random random(7);
  const DownMatrix down(random, kOutputs, depth, format, begin, width);
  const auto x = random.normals(kRows * width, 1.0f);
  const Operands operands(table, mode, x, kRows, width);
  for (size_t panel = 0; panel < kOutputs / kPanelColumns; ++panel) {
    const auto packed = down.slice.down_panel(0, panel);
    const auto sums = multiply(table, mode, format, packed, operands, 0, kRows, true);
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t c = 0; c < kPanelColumns; ++c) {
        double wanted = 0.0;
        double size = 0.0;
        for (size_t k = 0; k < width; ++k) {
          const double weight =
              down.expert.down.values[(panel * kPanelColumns + c) * depth + begin + k];
          const double product = weight * operand_value(mode, x[r * width + k]);
          wanted += product;
          size += std::abs(product);
        }
        CHECK(std::abs(sums[r * kPanelColumns + c] - wanted) <= 1e-6 * size);
      }
    }
    for (const bool contiguous : {false, true}) {
      for (size_t count : {1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33}) {
        const size_t first = (count * 5) % (kRows - count);
        const auto some = multiply(table, mode, format, packed, operands, first, count, contiguous);
        CHECK(std::equal(some.begin(), some.end(),
                         sums.begin() + static_cast<ptrdiff_t>(first * kPanelColumns)));
      }
    }
  }
}

TEST(panels_are_right_and_rows_independent) {
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : kModes) {
      for (const WeightFormat format : kFormats) {
        check_panels(*table, mode, format, 32, 0, 32);
        check_panels(*table, mode, format, 256, 0, 256);
        check_panels(*table, mode, format, 416, 0, 416);
        check_panels(*table, mode, format, 416, 96, 192);  // scale blocks cut at both ends
      }
    }
  }
}

TEST(depths_beyond_one_segment) {
  for (const KernelTable* table : runnable_tables()) {
    check_panels(*table, Dtype::kBfloat16, WeightFormat::kBf16, 2144, 0, 2144);
    check_panels(*table, Dtype::kFloat32, WeightFormat::kBf16, 1056, 0, 1056);
  }
}

// Unit vectors read the weights one by one: each of the 254 codes must come out exactly.
TEST(every_fp8_code_is_exact) {
  constexpr size_t kSize = 32;
  Expert expert;
  Random random(1);
  expert = random_expert(random, kSize, kSize, WeightFormat::kFp8);
  for (size_t i = 0; i < kSize * kSize; ++i) {
    const auto code = static_cast<uint8_t>(i % 256);
    expert.down.stored[i] = std::byte{is_nan_e4m3(code) ? uint8_t{0} : code};
  }
  expert.down.scales[0] = 0.5f;
  ExpertSlice slice({1, kSize, kSize, WeightFormat::kFp8}, 0, kSize, -1);
  for (size_t i = 0; i < slice.num_panels(); ++i) slice.pack_panel(0, i, expert.source());
  std::vector<float> unit(kSize * kSize, 0.0f);
  for (size_t i = 0; i < kSize; ++i) unit[i * kSize + i] = 1.0f;
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : kModes) {
      const Operands operands(*table, mode, unit, kSize, kSize);
      for (const size_t count : {size_t{1}, kSize}) {  // decoded on the fly, decoded beforehand
        for (size_t first = 0; first < kSize; first += count) {
          const auto sums = multiply(*table, mode, WeightFormat::kFp8, slice.down_panel(0, 0),
                                     operands, first, count, true);
          for (size_t i = 0; i < sums.size(); ++i) {
            const size_t k = first + i / kPanelColumns;
            const auto code =
                std::to_integer<uint8_t>(expert.down.stored[i % kPanelColumns * kSize + k]);
            CHECK_EQUAL(double{sums[i]}, 0.5 * from_e4m3(code));
          }
        }
      }
    }
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
    std::vector<float> out(rows * kTileColumns);
    const Scope scope(*table);
    kernels_of(*table, Dtype::kFloat32)
        .swiglu(sums.data(), rows, out.data(), kTileColumns * sizeof(float));
    for (size_t i = 0; i < out.size(); ++i) {
      const double gate = sums[i / kTileColumns * kPanelColumns + i % kTileColumns];
      const double wanted = 1.25 * gate / (1.0 + std::exp(-gate));
      CHECK(std::abs(out[i] - wanted) <= 4e-7 * std::abs(wanted) + 1e-35);
    }
  }
}

TEST(swiglu_keeps_nan) {
  std::vector<float> sums(kPanelColumns, 1.0f);
  sums[3] = std::numeric_limits<float>::quiet_NaN();
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : kModes) {
      const auto& kernels = kernels_of(*table, mode);
      std::vector<std::byte> out(kTileColumns * kernels.operand_bytes);
      const Scope scope(*table);
      kernels.swiglu(sums.data(), 1, out.data(), out.size());
      for (size_t i = 0; i < kTileColumns; ++i) {
        float value;
        if (kernels.operand_bytes == 2) {
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
    std::vector<float> nan(kPanelColumns, std::numeric_limits<float>::quiet_NaN());
    const uint32_t all_ones = 0x7FFFFFFF;
    std::memcpy(nan.data() + 1, &all_ones, sizeof(all_ones));
    table->finish[static_cast<size_t>(Dtype::kBfloat16)](nan.data(), out.data());
    for (size_t i = 0; i < kPanelColumns; ++i) CHECK(std::isnan(from_bf16(out[i])));
  }
}

TEST(conversions_of_both_types) {
  Random random(4);
  const auto values = random.normals(64, 1.0f);
  std::vector<uint16_t> halves;
  for (const float v : values) halves.push_back(to_bf16(v));
  for (const KernelTable* table : runnable_tables()) {
    for (const Dtype mode : kModes) {
      const auto& kernels = kernels_of(*table, mode);
      const Scope scope(*table);
      for (const bool from_half : {false, true}) {
        const auto convert = kernels.convert[from_half ? 1 : 0];
        if (convert == nullptr) {  // the type is an operand already: sizes must agree
          CHECK_EQUAL(kernels.operand_bytes, from_half ? size_t{2} : size_t{4});
          continue;
        }
        std::vector<float> floats(64);
        std::vector<uint16_t> bits(64);
        const bool to_half = kernels.operand_bytes == 2;
        convert(from_half ? static_cast<const void*>(halves.data()) : values.data(), 64,
                to_half ? static_cast<void*>(bits.data()) : floats.data());
        for (size_t i = 0; i < 64; ++i) {
          const bool rounds = from_half || mode == Dtype::kBfloat16;
          const float wanted = rounds ? from_bf16(halves[i]) : values[i];
          CHECK_EQUAL(to_half ? from_bf16(bits[i]) : floats[i], wanted);
        }
      }
    }
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
