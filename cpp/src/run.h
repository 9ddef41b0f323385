// One forward under way: two parallel regions (three when the pool has several parts, plus one to
// make operands when there are many tokens). First gate, up and activation function for each
// expert; then down and, column by column, the weighted sum over all experts, in order of their
// ids.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "moe.h"

namespace ktt {

// Kernel calls of one task lie between its construction and its end.
class KernelScope {
 public:
  explicit KernelScope(const KernelTable& table) : table_(table), state_(table.enter()) {}
  ~KernelScope() { table_.leave(state_); }
  KernelScope(const KernelScope&) = delete;
  KernelScope& operator=(const KernelScope&) = delete;

 private:
  const KernelTable& table_;
  uint32_t state_;
};

class Layer::Run {
 public:
  Run(Layer& layer, const ForwardArgs& args);

  void forward();

 private:
  using Panels = ExpertSlice::Panels;

  // Whether an expert has a copy of its rows side by side.
  bool is_gathered(size_t expert) const {
    return groups_.num_positions(expert) >= kernels_.min_tile_rows;
  }
  std::byte* operands(size_t token) const {
    return scratch_.operands.data() + token * operand_row_;
  }
  std::byte* gathered_row(size_t position) const {
    return scratch_.gathered.data() + position * operand_row_;
  }
  std::byte* activation_row(size_t part, size_t position) const;
  std::byte* values_row(size_t part, size_t position) const;
  size_t values_row_bytes(size_t part) const;
  float* products(size_t part, const Grouping::Chunk& chunk, size_t panel) const;
  float* part_totals(size_t part, size_t panel) const;

  void write_zeros() const;
  void make_operands();
  void make_operands(size_t token) const;

  void run_gate_up();
  void gate_up(Pool::Place place, const PanelRange& task);
  void quantise(size_t part, const Grouping::Chunk& chunk) const;

  void run_down();
  void run_down_by_chunks();
  void run_down_by_columns();
  void close_columns(Pool::Place place, const PanelRange& task);
  template <class AddChunk>
  void sum_columns(Pool::Place place, size_t first, size_t count, AddChunk add_chunk);
  void add(const Grouping::Chunk& chunk, const float* sums, size_t num_panels, float* totals) const;
  void sum_parts();
  void write(const float* total, size_t token, size_t panel) const;

  // Let the worker point to a chunk's rows; return their stride if they lie side by side, else 0.
  size_t point_to_operands(Pool::Place place, const Grouping::Chunk& chunk) const;
  size_t point_to_activations(Pool::Place place, const Grouping::Chunk& chunk) const;
  // Calls fn for as many of a task's panels as suit the kernels, after each other.
  template <class Fn>
  void for_each_call(const PanelRange& task, Fn fn) const;
  // The product of some panels with the rows the worker points to.
  struct Rows {
    size_t count;
    size_t stride;
  };
  void multiply(Pool::Place place, const Panels& panels, PanelRange range, Rows rows,
                float* sums) const;

  Layer& layer_;
  const ForwardArgs& args_;
  Pool& pool_;
  Scratch& scratch_;
  Grouping& groups_;
  const KernelTable& table_;
  const ActivationKernels& kernels_;
  const size_t num_tokens_;
  const size_t hidden_;
  const size_t operand_row_;  // bytes
  const size_t x_row_;        // bytes, of out's rows as well
  void (*const convert_)(const void* source, const Depth& depth, void* operands);
  void (*const multiply_)(const BlockTask& task);
  void (*const finish_)(const float* totals, void* out);
  size_t down_unit_ = 1;  // panels whose products are added up together
};

template <class Fn>
void Layer::Run::for_each_call(const PanelRange& task, Fn fn) const {
  const uint32_t most = static_cast<uint32_t>(kernels_.num_panels);
  const uint32_t end = task.first + task.count;
  for (uint32_t first = task.first; first < end; first += most) {
    fn(PanelRange{task.chunk, first, std::min(most, end - first)});
  }
}

}  // namespace ktt
