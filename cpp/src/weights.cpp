#include "weights.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace ktt {
namespace {

constexpr size_t kNoSlot = ~static_cast<size_t>(0);

// Bits that are all set in what is no finite number; of fp8 e4m3fn that is NaN alone.
constexpr uint8_t kFp8Mask = 0x7F;
constexpr uint16_t kBfloatMask = 0x7F80;
constexpr uint32_t kFloatMask = 0x7F800000;

template <class T>
T masked(const std::byte* value, T mask) {
  T bits;
  std::memcpy(&bits, value, sizeof(T));
  return bits & mask;
}

// Whether a value has all bits of the mask. No branch for each: every weight is asked.
template <class T>
bool any_has_bits(const std::byte* values, size_t num_bytes, T mask) {
  T largest = 0;
  for (size_t at = 0; at < num_bytes; at += sizeof(T)) {
    largest = std::max(largest, masked(values + at, mask));
  }
  return largest == mask;
}

// Sixteen rows of a caller's matrix, or the rows of its scales that go with them.
struct Rows {
  const void* values;
  size_t row_bytes;
  size_t num_rows;
  size_t num_columns;
  size_t row;  // the first one's, in the whole matrix
  size_t column;
};

// Throws if a value is no finite number.
template <class T>
void refuse_first(const std::string& name, const Rows& rows, T mask) {
  for (size_t r = 0; r < rows.num_rows; ++r) {
    const auto* row = static_cast<const std::byte*>(rows.values) + r * rows.row_bytes;
    for (size_t c = 0; c < rows.num_columns; ++c) {
      if (masked(row + c * sizeof(T), mask) != mask) continue;
      throw Error(ErrorCode::kInvalidArgument,
                  name + " [" + std::to_string(rows.row + r) + ", " +
                      std::to_string(rows.column + c) +
                      "] is not a finite number; the checkpoint is damaged");
    }
  }
}

std::string name_of(size_t expert, bool is_down, size_t tile) {
  const char* matrix = is_down ? "down" : tile == 0 ? "gate" : "up";
  return "expert " + std::to_string(expert) + ": " + matrix;
}

const void* moved(const void* p, size_t num_bytes) {
  return static_cast<const std::byte*>(p) + num_bytes;
}
void* moved(void* p, size_t num_bytes) { return static_cast<std::byte*>(p) + num_bytes; }

}  // namespace

ExpertSlice::ExpertSlice(const LayerShape& shape, size_t begin, size_t width, size_t down_group,
                         int numa_node)
    : shape_(shape),
      begin_(begin),
      width_(width),
      slot_of_(shape.num_experts, kNoSlot),
      is_taken_(shape.num_experts) {
  const Depth hidden = {shape.hidden_size, 0, shape.group};
  const Depth slice = {width, begin, down_group};
  gate_up_ = section(hidden, shape.hidden_size, width / kTileColumns);
  down_ = section(slice, shape.intermediate_size, width == 0 ? 0 : hidden.size / kPanelColumns);
  for (Section* s : {&gate_up_, &down_}) s->weights_at = extend_place(s->count * s->panel_bytes);
  for (Section* s : {&gate_up_, &down_}) {
    s->scales_at = extend_place(s->count * s->panel_scale_bytes);
  }
  buffer_ = Buffer(round_up(place_bytes_ * shape.num_experts, kHugePage), numa_node);
}

ExpertSlice::Section ExpertSlice::section(const Depth& depth, size_t row_elements,
                                          size_t count) const {
  return {.depth = depth,
          .row_elements = row_elements,
          .count = count,
          .panel_bytes = panel_bytes(shape_.format, depth.size),
          .panel_scale_bytes = panel_scale_bytes(shape_.format, depth),
          .weights_at = 0,
          .scales_at = 0};
}

size_t ExpertSlice::extend_place(size_t num_bytes) {
  const size_t at = place_bytes_;
  place_bytes_ += round_up(num_bytes, kCacheLine);
  return at;
}

void ExpertSlice::take(size_t expert) {
  if (slot_of_[expert] != kNoSlot) return;
  const auto slot = std::find(is_taken_.begin(), is_taken_.end(), false);
  *slot = true;
  slot_of_[expert] = static_cast<size_t>(slot - is_taken_.begin());
}

// Whole huge pages only: a page that is torn apart stays so. One that neighbours share goes with
// the last of them.
void ExpertSlice::release(size_t expert) {
  if (slot_of_[expert] == kNoSlot) return;
  size_t begin = slot_of_[expert];
  size_t end = begin + 1;
  is_taken_[begin] = false;
  slot_of_[expert] = kNoSlot;
  while (begin > 0 && !is_taken_[begin - 1]) --begin;
  while (end < is_taken_.size() && !is_taken_[end]) ++end;
  const size_t first_byte = round_up(begin * place_bytes_, kHugePage);
  const size_t end_byte =
      end == is_taken_.size() ? buffer_.size() : end * place_bytes_ / kHugePage * kHugePage;
  if (first_byte < end_byte) buffer_.release(first_byte, end_byte - first_byte);
}

ExpertSlice::Panels ExpertSlice::panels(const Section& section, size_t expert) const {
  const std::byte* data = place(expert);
  return {.weights = data + section.weights_at,
          .panel_bytes = section.panel_bytes,
          .scales = section.panel_scale_bytes == 0 ? nullptr : data + section.scales_at,
          .panel_scale_bytes = section.panel_scale_bytes,
          .depth = section.depth,
          .count = section.count};
}

ExpertSlice::Panel ExpertSlice::panel(size_t expert, size_t index) const {
  const bool is_down = index >= gate_up_.count;
  const Section& s = is_down ? down_ : gate_up_;
  const size_t i = is_down ? index - gate_up_.count : index;
  const size_t row = is_down ? i * kPanelColumns : begin_ + i * kTileColumns;
  return {.section = s,
          .is_down = is_down,
          .weights = place(expert) + s.weights_at + i * s.panel_bytes,
          .scales = place(expert) + s.scales_at + i * s.panel_scale_bytes,
          .tile_row = {row, is_down ? row + kTileColumns : row}};
}

size_t ExpertSlice::scale_row(size_t row) const {
  return traits(shape_.format).scales == Scales::kSquares ? row / kChunkDepth : row;
}

template <class Rows, class Expert>
ExpertSlice::CallerRows<Rows> ExpertSlice::caller_rows(const Panel& panel,
                                                       const Expert& caller) const {
  const FormatTraits t = traits(shape_.format);
  const Depth& depth = panel.section.depth;
  const size_t row_bytes = weight_bytes(shape_.format, panel.section.row_elements);
  const size_t scale_row_bytes = ceil_div(panel.section.row_elements, shape_.group) * t.scale_bytes;
  const auto weights = [&](auto matrix, size_t tile) {
    return moved(matrix,
                 panel.tile_row[tile] * row_bytes + weight_bytes(shape_.format, depth.begin));
  };
  const auto scales = [&](auto matrix, size_t tile) {
    return moved(matrix, scale_row(panel.tile_row[tile]) * scale_row_bytes +
                             depth.begin / shape_.group * t.scale_bytes);
  };
  if (panel.is_down) {
    return {{{weights(caller.down, 0), weights(caller.down, 1)}, row_bytes},
            {{scales(caller.down_scale, 0), scales(caller.down_scale, 1)}, scale_row_bytes}};
  }
  return {{{weights(caller.gate, 0), weights(caller.up, 1)}, row_bytes},
          {{scales(caller.gate_scale, 0), scales(caller.up_scale, 1)}, scale_row_bytes}};
}

void ExpertSlice::pack_panel(size_t expert, size_t index, const ExpertSource& source) {
  const Panel panel = this->panel(expert, index);
  const auto rows = caller_rows<PanelSource>(panel, source);
  ktt::pack_panel(shape_.format, rows.weights, panel.section.depth, panel.weights);
  pack_scales(shape_.format, rows.scales, panel.section.depth, shape_.group, panel.scales);
  check_finite(expert, panel, rows);
}

void ExpertSlice::unpack_panel(size_t expert, size_t index, const ExpertTarget& target) const {
  const Panel panel = this->panel(expert, index);
  const auto rows = caller_rows<PanelTarget>(panel, target);
  ktt::unpack_panel(shape_.format, panel.weights, panel.section.depth, rows.weights);
  // A square's scale stands in eight panels or more: the first of them gives it back.
  const bool is_square = traits(shape_.format).scales == Scales::kSquares;
  if (is_square && panel.tile_row[0] % kChunkDepth != 0) return;
  unpack_scales(shape_.format, panel.scales, panel.section.depth, shape_.group, rows.scales);
}

// Looks at what was just packed, which lies together and in the cache. Only when something is wrong
// there its place in the caller's matrices is looked for.
void ExpertSlice::check_finite(size_t expert, const Panel& panel,
                               const CallerRows<PanelSource>& rows) const {
  const size_t num_scale_bytes = panel.section.panel_scale_bytes;
  switch (traits(shape_.format).scales) {
    case Scales::kNone:
      return;
    case Scales::kSquares:
      if (any_has_bits(panel.weights, panel.section.panel_bytes, kFp8Mask)) {
        refuse_weight(expert, panel, rows.weights);
      }
      if (any_has_bits(panel.scales, num_scale_bytes, kFloatMask)) {
        refuse_scale(expert, panel, rows.scales, kFloatMask);
      }
      return;
    case Scales::kGroups:
      if (any_has_bits(panel.scales, num_scale_bytes, kBfloatMask)) {
        refuse_scale(expert, panel, rows.scales, kBfloatMask);
      }
  }
}

void ExpertSlice::refuse_weight(size_t expert, const Panel& panel,
                                const PanelSource& source) const {
  const Depth& depth = panel.section.depth;
  for (size_t t = 0; t < 2; ++t) {
    refuse_first(name_of(expert, panel.is_down, t) + " weight",
                 {source.tile[t], source.row_bytes, kTileColumns, depth.size, panel.tile_row[t],
                  depth.begin},
                 kFp8Mask);
  }
}

template <class T>
void ExpertSlice::refuse_scale(size_t expert, const Panel& panel, const PanelSource& source,
                               T mask) const {
  const Depth& slice = panel.section.depth;
  const Depth depth = {slice.size, slice.begin, shape_.group};  // as the caller has it
  for (size_t t = 0; t < 2; ++t) {
    refuse_first(name_of(expert, panel.is_down, t) + " scale",
                 {source.tile[t], source.row_bytes, scale_rows(shape_.format), depth.num_groups(),
                  scale_row(panel.tile_row[t]), depth.begin / depth.group},
                 mask);
  }
}

}  // namespace ktt
