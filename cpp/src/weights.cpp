#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "error.h"

namespace ktt {
namespace {

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// One tile of 16 columns (rows of the source) and 32 depths in pairs of depths. Copied by bytes: a
// checkpoint's matrix may start anywhere in its file.
template <size_t kPairBytes>
void pack_tile(const std::byte* source, size_t row_bytes, std::byte* tile) {
  for (size_t column = 0; column < kTileColumns; ++column) {
    for (size_t pair = 0; pair < kStepDepth / 2; ++pair) {
      std::memcpy(tile + (pair * kTileColumns + column) * kPairBytes,
                  source + column * row_bytes + pair * kPairBytes, kPairBytes);
    }
  }
}

// A panel from two times 16 rows of row-major matrices whose rows are `stride` elements apart.
template <size_t kElementBytes>
void pack_panel(const void* first, const void* second, size_t stride, size_t depth, void* panel) {
  constexpr size_t kStepRowBytes = kStepDepth * kElementBytes;
  constexpr size_t kTileBytes = kStepElements / 2 * kElementBytes;
  const auto* a = static_cast<const std::byte*>(first);
  const auto* b = static_cast<const std::byte*>(second);
  auto* to = static_cast<std::byte*>(panel);
  for (size_t step = 0; step < depth / kStepDepth; ++step) {
    pack_tile<2 * kElementBytes>(a, stride * kElementBytes, to);
    pack_tile<2 * kElementBytes>(b, stride * kElementBytes, to + kTileBytes);
    a += kStepRowBytes;
    b += kStepRowBytes;
    to += 2 * kTileBytes;
  }
}

void pack(size_t element_bytes, const void* first, const void* second, size_t stride, size_t depth,
          void* panel) {
  if (element_bytes == 2) {
    pack_panel<2>(first, second, stride, depth, panel);
  } else {
    pack_panel<1>(first, second, stride, depth, panel);
  }
}

const void* at(const void* matrix, size_t element, size_t element_bytes) {
  return static_cast<const std::byte*>(matrix) + element * element_bytes;
}

// No branch for each code: this is done to every weight that is loaded, many at once.
bool holds_nan(const uint8_t* codes, size_t count) {
  uint8_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<uint8_t>(codes[i] & 0x7F));
  }
  return largest == 0x7F;
}

void check_fp8(const void* matrix, size_t rows, size_t columns, const std::string& name) {
  const auto* codes = static_cast<const uint8_t*>(matrix);
  const auto* end = codes + rows * columns;
  if (!holds_nan(codes, rows * columns)) return;
  const auto* found = std::find_if(codes, end, [](uint8_t code) { return (code & 0x7F) == 0x7F; });
  const size_t i = static_cast<size_t>(found - codes);
  throw Error(ErrorCode::kInvalidArgument,
              name + " holds NaN at row " + std::to_string(i / columns) + ", column " +
                  std::to_string(i % columns) + "; the checkpoint is damaged");
}

void check_scales(const float* scales, size_t count, const std::string& name) {
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(scales[i])) {
      throw Error(ErrorCode::kInvalidArgument, name + " scale " + std::to_string(i) +
                                                   " is not a finite number; the checkpoint is "
                                                   "damaged");
    }
  }
}

}  // namespace

void check_finite(const LayerShape& shape, size_t expert, const ExpertSource& source) {
  const size_t block = traits(shape.format).scale_block;
  if (block == 0) return;
  const size_t inter = shape.intermediate_size;
  const size_t hidden = shape.hidden_size;
  const std::string name = "expert " + std::to_string(expert) + ": ";
  check_fp8(source.gate, inter, hidden, name + "gate");
  check_fp8(source.up, inter, hidden, name + "up");
  check_fp8(source.down, hidden, inter, name + "down");
  const size_t num_scales = ceil_div(inter, block) * ceil_div(hidden, block);
  check_scales(source.gate_scale, num_scales, name + "gate");
  check_scales(source.up_scale, num_scales, name + "up");
  check_scales(source.down_scale, num_scales, name + "down");
}

ExpertSlice::ExpertSlice(const LayerShape& shape, size_t begin, size_t width, int numa_node)
    : shape_(shape), traits_(traits(shape.format)), begin_(begin), width_(width) {
  const size_t block = traits_.scale_block;
  const size_t hidden = shape.hidden_size;
  gate_up_blocks_ = block == 0 ? 0 : ceil_div(hidden, block);
  down_first_block_ = block == 0 ? 0 : block - begin % block;
  down_blocks_ = block == 0 || width == 0 ? 0 : ceil_div(begin + width, block) - begin / block;
  const auto scale_bytes = [](size_t panels, size_t blocks) {
    return round_up(panels * blocks * 2 * sizeof(float), kCacheLine);
  };
  down_offset_ = num_gate_up_panels() * gate_up_panel_bytes();
  gate_up_scale_offset_ = down_offset_ + num_down_panels() * down_panel_bytes();
  down_scale_offset_ = gate_up_scale_offset_ + scale_bytes(num_gate_up_panels(), gate_up_blocks_);
  expert_bytes_ = down_scale_offset_ + scale_bytes(num_down_panels(), down_blocks_);
  buffer_ = Buffer(expert_bytes_ * shape.num_experts, numa_node);
}

size_t ExpertSlice::gate_up_panel_bytes() const {
  return kPanelColumns * shape_.hidden_size * traits_.element_bytes;
}

size_t ExpertSlice::down_panel_bytes() const {
  return kPanelColumns * width_ * traits_.element_bytes;
}

ExpertSlice::Panel ExpertSlice::gate_up_panel(size_t expert, size_t index) const {
  const std::byte* base = buffer_.data() + expert * expert_bytes_;
  const auto* scales = reinterpret_cast<const float*>(base + gate_up_scale_offset_);
  return {base + index * gate_up_panel_bytes(), scales + index * gate_up_blocks_ * 2,
          shape_.hidden_size, traits_.scale_block};
}

ExpertSlice::Panel ExpertSlice::down_panel(size_t expert, size_t index) const {
  const std::byte* base = buffer_.data() + expert * expert_bytes_;
  const auto* scales = reinterpret_cast<const float*>(base + down_scale_offset_);
  return {base + down_offset_ + index * down_panel_bytes(), scales + index * down_blocks_ * 2,
          width_, down_first_block_};
}

void ExpertSlice::pack_panel(size_t expert, size_t index, const ExpertSource& source) {
  if (index < num_gate_up_panels()) {
    pack_gate_up(expert, index, source);
  } else {
    pack_down(expert, index - num_gate_up_panels(), source);
  }
}

void ExpertSlice::pack_gate_up(size_t expert, size_t index, const ExpertSource& source) {
  const size_t hidden = shape_.hidden_size;
  const size_t row = begin_ + index * kTileColumns;
  const Panel panel = gate_up_panel(expert, index);
  pack(traits_.element_bytes, at(source.gate, row * hidden, traits_.element_bytes),
       at(source.up, row * hidden, traits_.element_bytes), hidden, hidden,
       const_cast<void*>(panel.weights));
  auto* scales = const_cast<float*>(panel.scales);
  for (size_t i = 0; i < gate_up_blocks_; ++i) {
    const size_t from = row / traits_.scale_block * gate_up_blocks_ + i;
    scales[2 * i] = source.gate_scale[from];
    scales[2 * i + 1] = source.up_scale[from];
  }
}

void ExpertSlice::pack_down(size_t expert, size_t index, const ExpertSource& source) {
  const size_t inter = shape_.intermediate_size;
  const size_t row = index * kPanelColumns;
  const Panel panel = down_panel(expert, index);
  pack(traits_.element_bytes, at(source.down, row * inter + begin_, traits_.element_bytes),
       at(source.down, (row + kTileColumns) * inter + begin_, traits_.element_bytes), inter, width_,
       const_cast<void*>(panel.weights));
  auto* scales = const_cast<float*>(panel.scales);
  for (size_t i = 0; i < down_blocks_; ++i) {
    const size_t blocks_per_row = ceil_div(inter, traits_.scale_block);
    const size_t from =
        row / traits_.scale_block * blocks_per_row + begin_ / traits_.scale_block + i;
    scales[2 * i] = scales[2 * i + 1] = source.down_scale[from];
  }
}

}  // namespace ktt
