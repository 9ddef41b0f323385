// One layer's packed expert weights within one part of the pool: a slice of the intermediate size,
// on the part's memory. Knows the packed layout (see layout.h), nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/layout.h"
#include "memory.h"

namespace ktt {

// One expert's weights as the caller has them: row major. fp8 scales are fp32
// [ceil(rows / 128), ceil(columns / 128)], int8 and int4 scales bfloat16 [rows, ceil(columns /
// group)], both row major.
struct ExpertSource {
  const void* gate;  // [intermediate, hidden]
  const void* up;
  const void* down;  // [hidden, intermediate]
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
  // Columns [begin, begin + width) of the intermediate size; width may be 0. Memory is reserved
  // for all experts, but taken only by those that are set.
  ExpertSlice(const LayerShape& shape, size_t begin, size_t width, int numa_node);

  size_t width() const { return width_; }
  size_t num_gate_up_panels() const { return width_ / kTileColumns; }
  size_t num_down_panels() const { return width_ == 0 ? 0 : shape_.hidden_size / kPanelColumns; }
  size_t num_panels() const { return num_gate_up_panels() + num_down_panels(); }
  size_t bytes_per_expert() const { return expert_bytes_; }

  // Packs or unpacks panel i of an expert: gate/up panels first, then down panels. Packing throws
  // Error naming the first weight or scale that is not a finite number (bfloat16 weights are taken
  // as they are). With several parts, every part's slice unpacks into the same target.
  void pack_panel(size_t expert, size_t index, const ExpertSource& source);
  void unpack_panel(size_t expert, size_t index, const ExpertTarget& target) const;
  // Gives an expert's memory back.
  void release(size_t expert);

  // A matrix of an expert, as BlockTask wants it.
  struct Panels {
    const std::byte* weights;
    size_t panel_bytes;
    const std::byte* scales;  // null for kBf16
    size_t panel_scale_bytes;
    Depth depth;
    size_t count;
  };
  Panels gate_up(size_t expert) const;
  Panels down(size_t expert) const;
};

}  // namespace ktt
