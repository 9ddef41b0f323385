// One layer's packed expert weights within one part of the pool: a slice of the intermediate size,
// on the part's memory. Knows the packed layout (see kernel_table.h), nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"
#include "memory.h"

namespace ktt {

// One expert's weights as the caller has them: row major.
struct ExpertSource {
  const void* gate;  // [intermediate, hidden]
  const void* up;
  const void* down;         // [hidden, intermediate]
  const float* gate_scale;  // null for formats without scales
  const float* up_scale;
  const float* down_scale;
};

struct LayerShape {
  size_t num_experts;
  size_t hidden_size;
  size_t intermediate_size;
  WeightFormat format;
};

// Throws Error naming the first weight or scale that is not a finite number; FP8 weights and
// scales are looked at, bfloat16 weights are taken as they are.
void check_finite(const LayerShape& shape, size_t expert, const ExpertSource& source);

class ExpertSlice {
 public:
  // Columns [begin, begin + width) of the intermediate size; width may be 0.
  ExpertSlice(const LayerShape& shape, size_t begin, size_t width, int numa_node);

  size_t width() const { return width_; }
  size_t num_gate_up_panels() const { return width_ / kTileColumns; }
  size_t num_down_panels() const { return width_ == 0 ? 0 : shape_.hidden_size / kPanelColumns; }
  size_t num_panels() const { return num_gate_up_panels() + num_down_panels(); }
  size_t bytes_per_expert() const { return expert_bytes_; }

  // Packs panel i of an expert: gate/up panels first, then down panels.
  void pack_panel(size_t expert, size_t index, const ExpertSource& source);

  // What a PanelTask needs to know of a panel.
  struct Panel {
    const void* weights;
    const float* scales;
    size_t depth;
    size_t first_block;
  };
  Panel gate_up_panel(size_t expert, size_t index) const;
  Panel down_panel(size_t expert, size_t index) const;

 private:
  size_t gate_up_panel_bytes() const;
  size_t down_panel_bytes() const;
  void pack_gate_up(size_t expert, size_t index, const ExpertSource& source);
  void pack_down(size_t expert, size_t index, const ExpertSource& source);

  LayerShape shape_;
  FormatTraits traits_;
  size_t begin_;
  size_t width_;
  size_t gate_up_blocks_;  // scale blocks along the depth of each matrix
  size_t down_blocks_;
  size_t down_first_block_;  // a cut may leave the first block of down's depth short
  size_t down_offset_;       // bytes from an expert's start: gate/up, down, and their scales
  size_t gate_up_scale_offset_;
  size_t down_scale_offset_;
  size_t expert_bytes_;
  Buffer buffer_;
};

}  // namespace ktt
