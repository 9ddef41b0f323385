// One layer's packed expert weights within one part of the pool: a slice of the intermediate size,
// on the part's memory. Knows the packed layout (see layout.h), nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/layout.h"
#include "memory.h"

namespace ktt {

// One expert's weights as the caller has them: row major. fp8 scales are fp32
// [ceil(rows / 128), ceil(columns / 128)], int8 and int4 scales bfloat16 [rows, ceil(columns /
// group)], both row major.
struct ExpertSource {
  const void* gate;  // [intermediate, hidden]
  const void* up;
  const void* down;        // [hidden, intermediate]
  const void* gate_scale;  // null for formats without scales
  const void* up_scale;
  const void* down_scale;
};
struct ExpertTarget {  // the same, to be written
  void* gate;
  void* up;
  void* down;
  void* gate_scale;
  void* up_scale;
  void* down_scale;
};

struct LayerShape {
  size_t num_experts;
  size_t hidden_size;
  size_t intermediate_size;
  WeightFormat format;
  size_t group;  // weights along a row that share a scale; kChunkDepth for fp8 and without scales
};

class ExpertSlice {
 public:
  // Columns [begin, begin + width) of the intermediate size; width may be 0. Down is packed with a
  // scale for `down_group` weights, which divides the shape's group. Memory is reserved for all
  // experts, but taken only by those that are set.
  ExpertSlice(const LayerShape& shape, size_t begin, size_t width, size_t down_group,
              int numa_node);

  size_t width() const { return width_; }
  size_t num_gate_up_panels() const { return gate_up_.count; }
  size_t num_down_panels() const { return down_.count; }
  size_t num_panels() const { return gate_up_.count + down_.count; }
  const Depth& down_depth() const { return down_.depth; }
  size_t gate_up_panel_bytes() const { return gate_up_.panel_bytes; }
  size_t down_panel_bytes() const { return down_.panel_bytes; }
  size_t bytes_per_expert() const { return place_bytes_; }

  // Gives an expert a place, before its panels are packed; one that has a place keeps it.
  void take(size_t expert);
  // Gives an expert's place and memory back; nothing happens when it has none.
  void release(size_t expert);

  // Packs or unpacks panel i of an expert that has a place: gate/up panels first, then down panels.
  // Packing throws Error naming the first weight or scale that is not a finite number (bfloat16
  // weights are taken as they are). With several parts, every part's slice unpacks into the same
  // target; each byte is written by one of them.
  void pack_panel(size_t expert, size_t index, const ExpertSource& source);
  void unpack_panel(size_t expert, size_t index, const ExpertTarget& target) const;

  // A matrix of an expert that has a place, as BlockTask wants it.
  struct Panels {
    const std::byte* weights;
    size_t panel_bytes;
    const std::byte* scales;  // null for kBf16
    size_t panel_scale_bytes;
    Depth depth;
    size_t count;
  };
  Panels gate_up(size_t expert) const { return panels(gate_up_, expert); }
  Panels down(size_t expert) const { return panels(down_, expert); }

 private:
  // Where the panels of one matrix lie within an expert's place.
  struct Section {
    Depth depth;
    size_t row_elements;  // of the uncut matrix
    size_t count;         // of panels
    size_t panel_bytes;
    size_t panel_scale_bytes;
    size_t weights_at;
    size_t scales_at;
  };
  struct Panel {
    const Section& section;
    bool is_down;
    std::byte* weights;
    std::byte* scales;
    size_t tile_row[2];  // the first of 16 rows of the uncut matrix that a tile holds
  };
  // What of the caller's matrices and scales belongs to a panel; Rows is PanelSource or
  // PanelTarget.
  template <class Rows>
  struct CallerRows {
    Rows weights;
    Rows scales;
  };

  Section section(const Depth& depth, size_t row_elements, size_t count) const;
  size_t extend_place(size_t num_bytes);
  std::byte* place(size_t expert) const { return buffer_.data() + slot_of_[expert] * place_bytes_; }
  Panels panels(const Section& section, size_t expert) const;
  Panel panel(size_t expert, size_t index) const;
  size_t scale_row(size_t row) const;
  template <class Rows, class Expert>
  CallerRows<Rows> caller_rows(const Panel& panel, const Expert& caller) const;

  void check_finite(size_t expert, const Panel& panel, const CallerRows<PanelSource>& rows) const;
  void refuse_weight(size_t expert, const Panel& panel, const PanelSource& source) const;
  template <class T>
  void refuse_scale(size_t expert, const Panel& panel, const PanelSource& source, T mask) const;

  LayerShape shape_;
  size_t begin_;
  size_t width_;
  Section gate_up_;
  Section down_;
  size_t place_bytes_ = 0;
  // Experts lie in the lowest slots, wherever their ids are: neighbours share 2M pages, and an
  // expert that is not set would keep its part of them.
  std::vector<size_t> slot_of_;  // by expert; kNoSlot when it is not set
  std::vector<bool> is_taken_;   // by slot
  Buffer buffer_;
};

}  // namespace ktt
