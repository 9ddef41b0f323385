// The packed layout: where each weight lies, written a second time from the words of layout.h, and
// the way back.
#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/layout.h"

namespace {

using namespace ktt;

constexpr WeightFormat kFormats[] = {WeightFormat::kBf16, WeightFormat::kFp8, WeightFormat::kInt8,
                                     WeightFormat::kInt4};
constexpr Depth kDepths[] = {{32, 0, 128},   {96, 0, 128},  {128, 0, 128}, {160, 0, 128},
                             {32, 96, 128},  {64, 32, 128}, {96, 64, 128}, {256, 64, 128},
                             {416, 96, 128}, {320, 32, 128}};

// Two tiles of 16 rows, `gap` bytes between rows and an odd address: nothing may be aligned.
struct Matrix {
  Matrix(WeightFormat format, size_t depth, size_t gap)
      : row_bytes(weight_bytes(format, depth) + gap), bytes(kPanelColumns * row_bytes + 1) {}
  uint8_t* tile(size_t t) { return bytes.data() + 1 + t * kTileColumns * row_bytes; }
  PanelSource source() { return {{tile(0), tile(1)}, row_bytes}; }
  PanelTarget target() { return {{tile(0), tile(1)}, row_bytes}; }

  size_t row_bytes;
  std::vector<uint8_t> bytes;
};

// Element `index` of `bits` each, the lower one in the low bits.
unsigned element(const uint8_t* bytes, size_t bits, size_t index) {
  if (bits == 16) return bytes[2 * index] | bytes[2 * index + 1] << 8;
  if (bits == 8) return bytes[index];
  return bytes[index / 2] >> 4 * (index % 2) & 15u;
}

constexpr size_t kQuadOrder[] = {0, 2, 1, 3};  // its own inverse

// Index, in elements of the format, within a unit of 8 depths x 16 columns.
size_t place_in_unit(WeightFormat format, size_t column, size_t depth) {
  const size_t row = depth / 4;
  switch (format) {
    case WeightFormat::kBf16:
      return depth / 2 * 32 + column * 2 + depth % 2;
    case WeightFormat::kFp8:
      return row * 64 + column / 4 * 16 + depth % 4 / 2 * 8 + column % 4 * 2 + depth % 2;
    case WeightFormat::kInt8:
      return row * 64 + column * 4 + kQuadOrder[depth % 4];
    default:  // two elements to a byte
      return (column * 4 + kQuadOrder[depth % 4]) * 2 + row;
  }
}

size_t place(WeightFormat format, const Depth& depth, size_t tile, size_t column, size_t at) {
  const size_t chunk = (depth.begin + at) / kChunkDepth;
  const size_t begin = std::max(chunk * kChunkDepth, depth.begin) - depth.begin;
  const size_t end = std::min((chunk + 1) * kChunkDepth - depth.begin, depth.size);
  const size_t unit = (at - begin) / kUnitDepth;
  return begin * kPanelColumns + tile * kTileColumns * (end - begin) +
         unit * kUnitDepth * kTileColumns +
         place_in_unit(format, column, (at - begin) % kUnitDepth);
}

Matrix random_matrix(WeightFormat format, size_t depth, size_t gap) {
  Matrix m(format, depth, gap);
  std::mt19937 random(7);
  for (uint8_t& byte : m.bytes) byte = static_cast<uint8_t>(random());
  return m;
}

template <class Fn>
void for_each_case(Fn fn) {
  for (const WeightFormat format : kFormats) {
    for (const Depth& depth : kDepths) fn(format, depth);
  }
}

TEST(every_weight_lies_where_the_layout_says) {
  for_each_case([](WeightFormat format, const Depth& depth) {
    Matrix m = random_matrix(format, depth.size, 13);
    std::vector<uint8_t> panel(panel_bytes(format, depth.size));
    pack_panel(format, m.source(), depth, panel.data());
    const size_t bits = traits(format).bits;
    for (size_t tile = 0; tile < 2; ++tile) {
      for (size_t column = 0; column < kTileColumns; ++column) {
        for (size_t at = 0; at < depth.size; ++at) {
          CHECK_EQUAL(element(panel.data(), bits, place(format, depth, tile, column, at)),
                      element(m.tile(tile) + column * m.row_bytes, bits, at));
        }
      }
    }
  });
}

// The bytes of one unit's first row, spelled out: column c, depth d is stored as 16 * c + d.
std::vector<int> first_row(WeightFormat format, size_t tile_row) {
  const Depth depth = {32, 0, 128};
  Matrix m(format, depth.size, 0);
  for (size_t tile = 0; tile < 2; ++tile) {
    for (size_t column = 0; column < kTileColumns; ++column) {
      uint8_t* row = m.tile(tile) + column * m.row_bytes;
      for (size_t i = 0; i < 8; ++i) {
        if (format == WeightFormat::kBf16) row[2 * i] = static_cast<uint8_t>(16 * column + i);
        if (traits(format).bits == 8) row[i] = static_cast<uint8_t>(16 * column + i);
      }
      if (format == WeightFormat::kInt4) {
        for (size_t b = 0; b < 4; ++b) row[b] = static_cast<uint8_t>((2 * b + 1) << 4 | 2 * b);
      }
    }
  }
  std::vector<uint8_t> panel(panel_bytes(format, depth.size));
  pack_panel(format, m.source(), depth, panel.data());
  const auto at = panel.begin() + static_cast<std::ptrdiff_t>(64 * tile_row);
  return {at, at + 20};
}

TEST(rows_of_a_unit_spelled_out) {
  using Row = std::vector<int>;
  CHECK(first_row(WeightFormat::kBf16, 1) == (Row{0x02, 0, 0x03, 0, 0x12, 0, 0x13, 0, 0x22, 0,
                                                  0x23, 0, 0x32, 0, 0x33, 0, 0x42, 0, 0x43, 0}));
  CHECK(first_row(WeightFormat::kFp8, 1) ==
        (Row{0x04, 0x05, 0x14, 0x15, 0x24, 0x25, 0x34, 0x35, 0x06, 0x07,
             0x16, 0x17, 0x26, 0x27, 0x36, 0x37, 0x44, 0x45, 0x54, 0x55}));
  CHECK(first_row(WeightFormat::kInt8, 0) ==
        (Row{0x00, 0x02, 0x01, 0x03, 0x10, 0x12, 0x11, 0x13, 0x20, 0x22,
             0x21, 0x23, 0x30, 0x32, 0x31, 0x33, 0x40, 0x42, 0x41, 0x43}));
  CHECK(first_row(WeightFormat::kInt4, 0) ==
        (Row{0x40, 0x62, 0x51, 0x73, 0x40, 0x62, 0x51, 0x73, 0x40, 0x62,
             0x51, 0x73, 0x40, 0x62, 0x51, 0x73, 0x40, 0x62, 0x51, 0x73}));
}

TEST(unpacking_gives_back_every_bit_and_touches_nothing_else) {
  for_each_case([](WeightFormat format, const Depth& depth) {
    constexpr size_t kGap = 7;
    Matrix m = random_matrix(format, depth.size, kGap);
    std::vector<uint8_t> panel(panel_bytes(format, depth.size));
    pack_panel(format, m.source(), depth, panel.data());
    Matrix back(format, depth.size, kGap);
    std::fill(back.bytes.begin(), back.bytes.end(), uint8_t{0xA5});
    unpack_panel(format, panel.data(), depth, back.target());
    CHECK_EQUAL(int{back.bytes[0]}, 0xA5);
    for (size_t row = 0; row < kPanelColumns; ++row) {
      const uint8_t* in = m.tile(0) + row * m.row_bytes;
      const uint8_t* out = back.tile(0) + row * m.row_bytes;
      const size_t num_bytes = m.row_bytes - kGap;
      CHECK(std::equal(in, in + num_bytes, out));
      CHECK(std::all_of(out + num_bytes, out + m.row_bytes, [](int b) { return b == 0xA5; }));
    }
  });
}

// Scales of 32 columns, a row of them for each column or one for each tile.
template <class Scale>
struct ScaleMatrix {
  ScaleMatrix(size_t rows, size_t groups, Scale first) : groups(groups), values(2 * rows * groups) {
    for (Scale& value : values) value = first++;
  }
  Scale* tile(size_t t) { return values.data() + t * values.size() / 2; }
  PanelSource source() { return {{tile(0), tile(1)}, groups * sizeof(Scale)}; }
  PanelTarget target() { return {{tile(0), tile(1)}, groups * sizeof(Scale)}; }

  size_t groups;
  std::vector<Scale> values;
};

TEST(scales_of_groups_lie_by_group_then_column) {
  const Depth depth = {160, 96, 64};  // half a group, then two
  ScaleMatrix<uint16_t> m(kTileColumns, 3, 0);
  std::vector<uint16_t> panel(panel_scale_bytes(WeightFormat::kInt4, depth) / 2);
  pack_scales(WeightFormat::kInt4, m.source(), depth, depth.group, panel.data());
  for (size_t group = 0; group < 3; ++group) {
    for (size_t column = 0; column < kPanelColumns; ++column) {
      CHECK_EQUAL(panel[group * 32 + column], column * 3 + group);
    }
  }
}

TEST(scales_of_squares_lie_by_block_then_tile) {
  ScaleMatrix<float> m(1, 3, 0.5f);
  std::vector<float> panel(6);
  pack_scales(WeightFormat::kFp8, m.source(), {384, 0, 128}, 128, panel.data());
  CHECK((panel == std::vector<float>{0.5f, 3.5f, 1.5f, 4.5f, 2.5f, 5.5f}));
}

TEST(a_group_cut_in_two_is_given_back_by_its_first_half) {
  for (const Depth& depth : {Depth{160, 96, 64}, Depth{192, 64, 64}}) {
    ScaleMatrix<uint16_t> m(kTileColumns, 3, 100);
    std::vector<uint16_t> panel(panel_scale_bytes(WeightFormat::kInt8, depth) / 2);
    pack_scales(WeightFormat::kInt8, m.source(), depth, depth.group, panel.data());
    ScaleMatrix<uint16_t> back(kTileColumns, 3, 7000);
    ScaleMatrix<uint16_t> wanted = m;
    if (depth.begin % depth.group != 0) {
      for (size_t i = 0; i < wanted.values.size(); i += 3) wanted.values[i] = back.values[i];
    }
    unpack_scales(WeightFormat::kInt8, panel.data(), depth, depth.group, back.target());
    CHECK(back.values == wanted.values);
  }
}

TEST(scales_of_coarser_groups_are_repeated_and_given_back_once) {
  const Depth depth = {160, 96, 64};  // of groups of 128: the end of the first, a half of the next
  ScaleMatrix<uint16_t> m(kTileColumns, 2, 100);
  std::vector<uint16_t> panel(panel_scale_bytes(WeightFormat::kInt4, depth) / 2);
  pack_scales(WeightFormat::kInt4, m.source(), depth, 128, panel.data());
  ScaleMatrix<uint16_t> back(kTileColumns, 2, 7000);
  const ScaleMatrix<uint16_t> untouched = back;
  unpack_scales(WeightFormat::kInt4, panel.data(), depth, 128, back.target());
  for (size_t column = 0; column < kPanelColumns; ++column) {
    CHECK_EQUAL(panel[column], m.values[2 * column]);
    CHECK_EQUAL(panel[32 + column], m.values[2 * column + 1]);
    CHECK_EQUAL(panel[64 + column], m.values[2 * column + 1]);
    CHECK_EQUAL(back.values[2 * column], untouched.values[2 * column]);
    CHECK_EQUAL(back.values[2 * column + 1], m.values[2 * column + 1]);
  }
}

TEST(sizes) {
  CHECK_EQUAL(panel_bytes(WeightFormat::kBf16, 96), size_t{32 * 96 * 2});
  CHECK_EQUAL(panel_bytes(WeightFormat::kInt4, 96), size_t{32 * 96 / 2});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kBf16, {96, 0, 128}), size_t{0});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kFp8, {160, 96, 128}), size_t{2 * 2 * 4});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kFp8, {160, 0, 128}), size_t{2 * 2 * 4});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kInt8, {160, 96, 64}), size_t{3 * 32 * 2});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kInt4, {160, 96, 32}), size_t{5 * 32 * 2});
  CHECK_EQUAL(panel_scale_bytes(WeightFormat::kInt4, {0, 96, 32}), size_t{0});
}

}  // namespace
