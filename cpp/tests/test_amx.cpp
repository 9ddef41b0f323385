// The tile kernels over the software model of tiles, against plain arithmetic: every format and
// mode, ragged depths and cuts, and that a row's sums depend on nothing beside the row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/kernel_table.h"

namespace ktt {

const KernelTable& table_amx_emulated();

namespace {

constexpr WeightFormat kBf16 = WeightFormat::kBf16;
constexpr WeightFormat kFp8 = WeightFormat::kFp8;
constexpr WeightFormat kInt8 = WeightFormat::kInt8;
constexpr WeightFormat kInt4 = WeightFormat::kInt4;

const ActivationKernels& kernels_of(Activation mode) {
  return table_amx_emulated().activation[static_cast<size_t>(mode)];
}

class Scope {
 public:
  Scope() : state_(table_amx_emulated().enter()) {}
  ~Scope() { table_amx_emulated().leave(state_); }

 private:
  uint32_t state_;
};

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15;
  const int mantissa = code & 7;
  const float size =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -size : size;
}

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// Memory of exactly so many bytes on a cache line: a sanitizer sees a step past the end.
class Lines {
 public:
  explicit Lines(size_t bytes)
      : bytes_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}))) {
    std::memset(bytes_, 0xFF, bytes);
  }
  ~Lines() { ::operator delete(bytes_, std::align_val_t{64}); }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  std::byte* get() const { return bytes_; }

 private:
  std::byte* bytes_;
};

// Random weights of one slice: as numbers, and packed.
class Weights {
 public:
  Weights(WeightFormat format, const Depth& depth, size_t num_panels, unsigned seed)
      : format_(format),
        depth_(depth),
        num_panels_(num_panels),
        panel_bytes_(ktt::panel_bytes(format, depth.size)),
        scale_bytes_(panel_scale_bytes(format, depth)),
        random_(seed),
        packed_(num_panels * panel_bytes_),
        scales_(num_panels * scale_bytes_) {
    for (size_t p = 0; p < num_panels; ++p) {
      draw_panel(p);
      draw_scales(p);
    }
  }

  BlockTask task() const {
    BlockTask task{};
    task.weights = packed_.get();
    task.panel_bytes = panel_bytes_;
    task.scales = scale_bytes_ == 0 ? nullptr : scales_.get();
    task.panel_scale_bytes = scale_bytes_;
    task.num_panels = num_panels_;
    task.depth = depth_;
    return task;
  }

  size_t num_columns() const { return num_panels_ * kPanelColumns; }
  float value(size_t column, size_t k) const { return values_[column * depth_.size + k]; }
  float scale(size_t column, size_t group) const {
    const size_t panel = column / kPanelColumns;
    const std::byte* scales = scales_.get() + panel * scale_bytes_;
    const size_t c = column % kPanelColumns;
    switch (traits(format_).scales) {
      case Scales::kNone:
        return 1.0f;
      case Scales::kSquares:
        return load<float>(scales + (2 * group + c / kTileColumns) * sizeof(float));
      case Scales::kGroups:
        return from_bf16(load<uint16_t>(scales + (kPanelColumns * group + c) * 2));
    }
    throw check::Failure("no such scales");
  }

 private:
  // A weight's bits, and what it stands for before scaling.
  uint32_t draw_code() {
    const auto bits = static_cast<uint32_t>(random_());
    switch (format_) {
      case kBf16:
        return (bits & 0x807F) | (0x3D80 + (bits >> 16 & 0x1FF));  // 2^-4 to 2^0
      case kFp8:
        return (bits & 0x7F) == 0x7F ? 0 : bits & 0xFF;
      case kInt8:
        return (bits & 0xFF) == 0x80 ? 0 : bits & 0xFF;
      case kInt4:
        return bits & 15;
    }
    throw check::Failure("no such format");
  }
  float value_of(uint32_t code) const {
    switch (format_) {
      case kBf16:
        return from_bf16(static_cast<uint16_t>(code));
      case kFp8:
        return from_e4m3(static_cast<uint8_t>(code));
      case kInt8:
        return static_cast<int8_t>(code);
      case kInt4:
        return static_cast<float>(code) - 8.0f;
    }
    throw check::Failure("no such format");
  }

  void draw_panel(size_t panel) {
    const size_t bits = traits(format_).bits;
    const size_t row_bytes = weight_bytes(format_, depth_.size);
    std::vector<std::byte> rows(kPanelColumns * row_bytes);
    for (size_t i = 0; i < kPanelColumns * depth_.size; ++i) {
      const uint32_t code = draw_code();
      values_.push_back(value_of(code));
      for (size_t b = 0; b < bits; b += 4) {  // half a byte at a time
        const size_t at = i * bits + b;
        rows[at / 8] |= std::byte{static_cast<uint8_t>((code >> b & 15) << at % 8)};
      }
    }
    pack_panel(format_, {{rows.data(), rows.data() + kTileColumns * row_bytes}, row_bytes}, depth_,
               packed_.get() + panel * panel_bytes_);
  }

  void draw_scales(size_t panel) {
    const size_t bytes = traits(format_).scale_bytes;
    std::byte* scales = scales_.get() + panel * scale_bytes_;
    for (size_t at = 0; at < scale_bytes_; at += bytes) {
      const auto bits = static_cast<uint32_t>(0x3C000000 + random_() % 0x01000000);
      std::memcpy(scales + at, reinterpret_cast<const char*>(&bits) + 4 - bytes, bytes);
    }
  }

  WeightFormat format_;
  Depth depth_;
  size_t num_panels_;
  size_t panel_bytes_;
  size_t scale_bytes_;
  std::mt19937 random_;
  std::vector<float> values_;
  Lines packed_;
  Lines scales_;
};

// Rows of activations as operands, each also on its own. What is past a row's end is no number.
class Operands {
 public:
  Operands(Activation mode, const Depth& depth, size_t num_rows)
      : depth_(depth), stride_(kernels_of(mode).row_bytes(depth)), together_(num_rows * stride_) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    std::vector<float> x(depth.size);
    const Scope scope;
    for (size_t r = 0; r < num_rows; ++r) {
      for (float& v : x) v = normal(random);
      std::byte* row = together_.get() + r * stride_;
      kernels_of(mode).convert[0](x.data(), depth, row);
      rows_.push_back(row);
      apart_.push_back(std::make_unique<Lines>(stride_));
      std::memcpy(apart_.back()->get(), row, stride_);
      rows_apart_.push_back(apart_.back()->get());
    }
  }

  void put(BlockTask& task, size_t first, size_t num_rows, bool contiguous) const {
    task.rows = (contiguous ? rows_ : rows_apart_).data() + first;
    task.row_stride = contiguous ? stride_ : 0;
    task.num_rows = num_rows;
  }

  const std::byte* row(size_t r) const { return static_cast<const std::byte*>(rows_[r]); }
  const Depth& depth() const { return depth_; }

 private:
  Depth depth_;
  size_t stride_;
  Lines together_;
  std::vector<std::unique_ptr<Lines>> apart_;
  std::vector<const void*> rows_;
  std::vector<const void*> rows_apart_;
};

using Sums = std::vector<float>;  // [panels][rows][kPanelColumns]

Sums multiply(Activation mode, WeightFormat format, BlockTask task) {
  const Scope scope;
  const Lines decode(kDecodeBytes);
  Sums sums(task.num_panels * task.num_rows * kPanelColumns,
            std::numeric_limits<float>::quiet_NaN());
  task.sums = sums.data();
  task.decode = decode.get();
  kernels_of(mode).multiply[static_cast<size_t>(format)](task);
  return sums;
}

size_t group_of(const Depth& depth, size_t k) {
  return (depth.begin + k) / depth.group - depth.begin / depth.group;
}

// bfloat16 operands: to rounding.
void check_pairs(const Weights& weights, const Operands& operands, size_t r, size_t column,
                 float sum) {
  const Depth& depth = operands.depth();
  double wanted = 0.0;
  double size = 0.0;
  for (size_t k = 0; k < depth.size; ++k) {
    const double x = from_bf16(load<uint16_t>(operands.row(r) + 2 * k));
    const double product = x * weights.value(column, k) * weights.scale(column, group_of(depth, k));
    wanted += product;
    size += std::abs(product);
  }
  CHECK(std::abs(sum - wanted) <= 1e-6 * size);
}

// int8 operands: to the last bit, for groups' sums are whole numbers.
void check_quads(const Weights& weights, const Operands& operands, size_t r, size_t column,
                 float sum) {
  constexpr size_t kQuadOrder[] = {0, 2, 1, 3};
  const Depth& depth = operands.depth();
  const std::byte* row = operands.row(r);
  std::vector<int32_t> products(depth.num_groups());
  for (size_t k = 0; k < depth.size; ++k) {
    const auto x = load<int8_t>(row + k / 4 * 4 + kQuadOrder[k % 4]);
    products[group_of(depth, k)] += x * static_cast<int32_t>(weights.value(column, k));
  }
  float wanted = 0.0f;
  for (size_t g = 0; g < products.size(); ++g) {
    const auto scale = load<float>(row + Int8Row::scales_offset(depth) + g * sizeof(float));
    wanted = std::fma(static_cast<float>(products[g]), weights.scale(column, g) * scale, wanted);
  }
  CHECK_EQUAL(sum, wanted);
}

void check_right(Activation mode, const Weights& weights, const Operands& operands,
                 const Sums& sums, size_t num_rows) {
  for (size_t column = 0; column < weights.num_columns(); ++column) {
    for (size_t r = 0; r < num_rows; ++r) {
      const float sum =
          sums[(column / kPanelColumns * num_rows + r) * kPanelColumns + column % kPanelColumns];
      (mode == Activation::kInt8 ? check_quads : check_pairs)(weights, operands, r, column, sum);
    }
  }
}

// Rows `first` to `first + count` of all panels.
Sums part_of(const Sums& sums, size_t num_panels, size_t first, size_t count) {
  const size_t panel = sums.size() / num_panels;
  Sums part;
  for (size_t p = 0; p < num_panels; ++p) {
    const auto begin = sums.begin() + static_cast<ptrdiff_t>(p * panel + first * kPanelColumns);
    part.insert(part.end(), begin, begin + static_cast<ptrdiff_t>(count * kPanelColumns));
  }
  return part;
}

void check_kernel(Activation mode, WeightFormat format, const Depth& depth, size_t num_panels,
                  size_t num_rows, const std::vector<size_t>& counts) {
  const Weights weights(format, depth, num_panels, 7);
  const Operands operands(mode, depth, num_rows);
  BlockTask task = weights.task();
  operands.put(task, 0, num_rows, true);
  const Sums all = multiply(mode, format, task);
  check_right(mode, weights, operands, all, num_rows);
  for (const size_t count : counts) {
    const size_t first = count * 5 % (num_rows - count + 1);
    const Sums wanted = part_of(all, num_panels, first, count);
    for (const bool contiguous : {false, true}) {
      operands.put(task, first, count, contiguous);
      CHECK(multiply(mode, format, task) == wanted);
    }
  }
  operands.put(task, 0, num_rows, true);
  task.num_panels = 1;  // one by one as all at once
  for (size_t p = 0; p < num_panels; ++p) {
    const Sums one = multiply(mode, format, task);
    CHECK(std::equal(one.begin(), one.end(), all.begin() + static_cast<ptrdiff_t>(p * one.size())));
    task.weights += task.panel_bytes;
    if (task.scales != nullptr) task.scales += task.panel_scale_bytes;
  }
}

struct Kernel {
  Activation mode;
  WeightFormat format;
  size_t group;
};

constexpr Kernel kKernels[] = {
    {Activation::kBfloat16, kBf16, 128}, {Activation::kBfloat16, kFp8, 128},
    {Activation::kBfloat16, kInt8, 32},  {Activation::kBfloat16, kInt8, 128},
    {Activation::kBfloat16, kInt4, 32},  {Activation::kBfloat16, kInt4, 64},
    {Activation::kBfloat16, kInt4, 128}, {Activation::kInt8, kInt8, 32},
    {Activation::kInt8, kInt8, 64},      {Activation::kInt8, kInt8, 128},
    {Activation::kInt8, kInt4, 32},      {Activation::kInt8, kInt4, 64},
    {Activation::kInt8, kInt4, 128}};

TEST(sums_are_right_for_ragged_depths_and_cuts) {
  for (const Kernel& kernel : kKernels) {
    for (const size_t size : {32, 64, 96, 128, 160, 416}) {
      for (const size_t begin : {0, 32, 64, 96}) {
        check_kernel(kernel.mode, kernel.format, {size, begin, kernel.group}, 3, 20, {1, 17});
      }
    }
  }
}

TEST(any_number_of_rows_gives_the_same_sums) {
  std::vector<size_t> counts;
  for (size_t count = 1; count <= 70; ++count) counts.push_back(count);
  for (const Kernel& kernel : kKernels) {
    check_kernel(kernel.mode, kernel.format, {288, 96, kernel.group}, 2, 70, counts);
  }
}

TEST(long_depths_and_full_calls) {
  for (const Kernel& kernel : kKernels) {
    check_kernel(kernel.mode, kernel.format, {2048, 0, kernel.group}, 1, 20, {1, 3});
    check_kernel(kernel.mode, kernel.format, {544, 32, kernel.group}, kMaxPanels, 3, {1});
    check_kernel(kernel.mode, kernel.format, {256, 0, kernel.group}, 2, kMaxRows, {100});
  }
}

// Stages then go by depth over all panels, not panel after panel.
TEST(more_rows_than_the_cache_holds) {
  for (const Activation mode : {Activation::kBfloat16, Activation::kInt8}) {
    check_kernel(mode, kInt4, {4224, 64, 128}, 5, kMaxRows, {16});
  }
}

// Where the sums of int8 reach furthest: 128 products of 127 * 127.
TEST(largest_int8_sums_are_exact) {
  const Depth depth{128, 0, 128};
  std::vector<float> x(depth.size, 1.0f);
  const std::vector<std::byte> rows(kPanelColumns * depth.size, std::byte{0x81});  // -127
  const Lines packed(panel_bytes(kInt8, depth.size));
  pack_panel(kInt8, {{rows.data(), rows.data() + kTileColumns * depth.size}, depth.size}, depth,
             packed.get());
  const std::vector<uint16_t> scales(kPanelColumns, 0x3F80);
  const auto& kernels = kernels_of(Activation::kInt8);
  const Lines row(kernels.row_bytes(depth));
  const void* const pointer = row.get();
  BlockTask task{};
  {
    const Scope scope;
    kernels.convert[0](x.data(), depth, row.get());
  }
  task.rows = &pointer;
  task.num_rows = 1;
  task.weights = packed.get();
  task.scales = reinterpret_cast<const std::byte*>(scales.data());
  task.num_panels = 1;
  task.depth = depth;
  for (const float sum : multiply(Activation::kInt8, kInt8, task)) {
    CHECK(std::abs(sum + 127.0f * 128.0f) <= 1e-3f);
  }
}

// Rows of one size lie an odd number of cache lines apart, or all of them would share few sets.
TEST(operand_rows_spread_over_the_cache) {
  for (const Activation mode : {Activation::kBfloat16, Activation::kInt8}) {
    for (const size_t size : {32, 512, 1024, 2048, 4096, 7168}) {
      const size_t bytes = kernels_of(mode).row_bytes({size, 0, 128});
      CHECK_EQUAL(bytes % 128, size_t{64});
    }
  }
}

}  // namespace
}  // namespace ktt
