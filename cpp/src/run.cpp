#include "run.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace ktt {
namespace {

// Elements below which handing work to other threads costs more than it saves.
constexpr size_t kSerialElements = 16384;
constexpr size_t kTokensPerTask = 8;

size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace

Layer::Run::Run(Layer& layer, const ForwardArgs& args)
    : layer_(layer),
      args_(args),
      pool_(layer.engine_->pool),
      scratch_(layer.engine_->scratch),
      groups_(scratch_.grouping),
      table_(*layer.engine_->dispatch.table),
      kernels_(layer.kernels_),
      num_tokens_(args.choices.num_tokens),
      hidden_(layer.shape_.hidden_size),
      operand_row_(kernels_.row_bytes(layer.input_depth())),
      x_row_(hidden_ * dtype_bytes(args.dtype)),
      convert_(kernels_.convert[static_cast<size_t>(args.dtype)]),
      multiply_(kernels_.multiply[static_cast<size_t>(layer.shape_.format)]),
      finish_(
          (args.accumulate ? table_.finish_add : table_.finish)[static_cast<size_t>(args.dtype)]) {}

void Layer::Run::forward() {
  groups_.group(args_.choices, layer_.is_set_);
  if (groups_.active().empty()) {
    if (!args_.accumulate) write_zeros();
    return;
  }
  make_operands();
  run_gate_up();
  run_down();
  if (pool_.num_parts() > 1) sum_parts();
}

void Layer::Run::write_zeros() const { std::memset(args_.out, 0, num_tokens_ * x_row_); }

std::byte* Layer::Run::activation_row(size_t part, size_t position) const {
  return scratch_.parts[part].activation.data() + position * layer_.activation_row_[part];
}

size_t Layer::Run::values_row_bytes(size_t part) const {
  return layer_.slices_[part].width() * kernels_.value_bytes;
}

std::byte* Layer::Run::values_row(size_t part, size_t position) const {
  return scratch_.parts[part].values.data() + position * values_row_bytes(part);
}

void Layer::Run::make_operands() {
  if (num_tokens_ * hidden_ <= kSerialElements) {
    const KernelScope scope(table_);
    for (size_t token = 0; token < num_tokens_; ++token) make_operands(token);
    return;
  }
  std::fill(scratch_.counts.begin(), scratch_.counts.end(), 0);
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const auto [begin, end] = share(ceil_div(num_tokens_, kTokensPerTask), part, pool_.num_parts());
    scratch_.counts[part] = end - begin;
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const size_t first =
        share(ceil_div(num_tokens_, kTokensPerTask), place.part, pool_.num_parts()).first + i;
    const size_t end = std::min((first + 1) * kTokensPerTask, num_tokens_);
    for (size_t token = first * kTokensPerTask; token < end; ++token) make_operands(token);
  });
}

// A token's row of operands, and a copy for each expert that wants its rows side by side.
void Layer::Run::make_operands(size_t token) const {
  std::byte* row = operands(token);
  convert_(static_cast<const std::byte*>(args_.x) + token * x_row_, layer_.input_depth(), row);
  const size_t top_k = args_.choices.top_k;
  for (size_t i = token * top_k; i < (token + 1) * top_k; ++i) {
    const uint32_t position = groups_.position_of()[i];
    if (position == Grouping::kNowhere) continue;
    if (is_gathered(static_cast<size_t>(args_.choices.ids[i]))) {
      std::memcpy(gathered_row(position), row, operand_row_);
    }
  }
}

void Layer::Run::multiply(Pool::Place place, const Panels& panels, PanelRange range, Rows rows,
                          float* sums) const {
  const Scratch::Worker& worker = *scratch_.workers[place.worker];
  BlockTask task;
  task.rows = worker.rows;
  task.row_stride = rows.stride;
  task.num_rows = rows.count;
  task.weights = panels.weights + range.first * panels.panel_bytes;
  task.panel_bytes = panels.panel_bytes;
  task.scales =
      panels.scales == nullptr ? nullptr : panels.scales + range.first * panels.panel_scale_bytes;
  task.panel_scale_bytes = panels.panel_scale_bytes;
  task.num_panels = range.count;
  task.depth = panels.depth;
  task.sums = sums;
  task.decode = worker.decode;
  multiply_(task);
}

void Layer::Run::run_gate_up() {
  const auto& chunks = groups_.chunks();
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    const size_t num_panels = slice.num_gate_up_panels();
    Scratch::Part& scratch = scratch_.parts[part];
    const size_t num_threads = pool_.num_threads(part);
    const size_t unit = unit_of(num_threads, num_panels * chunks.size(), kernels_.num_panels);
    cut_by_chunks(
        {num_threads, num_panels, slice.gate_up_panel_bytes(), unit, round_up(num_panels, unit)},
        chunks, scratch.tasks);
    scratch_.counts[part] = scratch.tasks.size();
    if (!kernels_.quantizes) continue;
    for (size_t c = 0; c < chunks.size(); ++c) {
      scratch.open_panels[c].store(static_cast<uint32_t>(num_panels), std::memory_order_relaxed);
    }
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    gate_up(place, scratch_.parts[place.part].tasks[i]);
  });
}

// Some panels of one expert for a chunk of its rows. Whoever finishes the last panel of a chunk
// quantises the chunk's activations, so that no thread waits for another.
void Layer::Run::gate_up(Pool::Place place, const PanelRange& task) {
  const KernelScope scope(table_);
  const size_t part = place.part;
  const Grouping::Chunk& chunk = groups_.chunks()[task.chunk];
  const Panels panels = layer_.slices_[part].gate_up(chunk.expert);
  Scratch::Worker& worker = *scratch_.workers[place.worker];
  const size_t stride = point_to_operands(place, chunk);
  const size_t first_row = chunk.first_position;
  std::byte* values =
      kernels_.quantizes ? values_row(part, first_row) : activation_row(part, first_row);
  const size_t value_stride =
      kernels_.quantizes ? values_row_bytes(part) : layer_.activation_row_[part];
  for_each_call(task, [&](const PanelRange& call) {
    multiply(place, panels, call, {chunk.num_rows, stride}, worker.sums);
    for (size_t i = 0; i < call.count; ++i) {
      kernels_.swiglu(worker.sums + i * chunk.num_rows * kPanelColumns, chunk.num_rows,
                      values + (call.first + i) * kTileColumns * kernels_.value_bytes,
                      value_stride);
    }
  });
  if (!kernels_.quantizes) return;
  auto& open = scratch_.parts[part].open_panels[task.chunk];
  if (open.fetch_sub(task.count, std::memory_order_acq_rel) == task.count) quantise(part, chunk);
}

void Layer::Run::quantise(size_t part, const Grouping::Chunk& chunk) const {
  const auto convert = kernels_.convert[static_cast<size_t>(Dtype::kFloat32)];
  const Depth depth = layer_.slices_[part].down(chunk.expert).depth;
  for (size_t p = chunk.first_position; p < chunk.first_position + chunk.num_rows; ++p) {
    convert(values_row(part, p), depth, activation_row(part, p));
  }
}

size_t Layer::Run::point_to_operands(Pool::Place place, const Grouping::Chunk& chunk) const {
  const void** rows = scratch_.workers[place.worker]->rows;
  const bool gathered = is_gathered(chunk.expert);
  for (size_t i = 0; i < chunk.num_rows; ++i) {
    const size_t position = chunk.first_position + i;
    rows[i] = gathered ? gathered_row(position) : operands(groups_.token_of()[position]);
  }
  return gathered ? operand_row_ : 0;
}

}  // namespace ktt
