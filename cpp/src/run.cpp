#include "run.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace ktt {
namespace {

// Elements below which handing work to other threads costs more than it saves.
constexpr size_t kSerialElements = 16384;
constexpr size_t kTokensPerTask = 8;

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

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

// [begin, end) of `count` things that fall to part i of n.
std::pair<size_t, size_t> share(size_t count, size_t part, size_t num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

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

float* Layer::Run::products(size_t part, const Grouping::Chunk& chunk, size_t panel) const {
  return scratch_.parts[part].products.as<float>() + chunk.first_position * hidden_ +
         panel * chunk.num_rows * kPanelColumns;
}

float* Layer::Run::part_totals(size_t part, size_t panel) const {
  return scratch_.parts[part].totals.as<float>() + panel * num_tokens_ * kPanelColumns;
}

// Calls fn for as many of a task's panels as suit the kernels, after each other.
template <class Fn>
void Layer::Run::for_each_call(const PanelRange& task, Fn fn) const {
  const uint32_t most = static_cast<uint32_t>(kernels_.num_panels);
  const uint32_t end = task.first + task.count;
  for (uint32_t first = task.first; first < end; first += most) {
    fn(PanelRange{task.chunk, first, std::min(most, end - first)});
  }
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

void Layer::Run::run_down() {
  const size_t product_bytes = groups_.num_positions() * hidden_ * sizeof(float);
  if (product_bytes <= layer_.engine_->product_bytes) {
    run_down_by_chunks();
  } else {
    run_down_by_columns();
  }
}

// A task is some output columns of one expert for a chunk of its rows. Whoever finishes the last
// chunk of some columns adds the experts up there, in the order of their ids.
void Layer::Run::run_down_by_chunks() {
  const auto& chunks = groups_.chunks();
  const size_t num_panels = hidden_ / kPanelColumns;
  down_unit_ = unit_of(pool_.num_threads(0), num_panels * chunks.size(),
                       std::min(kernels_.num_panels, panels_of_totals(num_tokens_)));
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    Scratch::Part& scratch = scratch_.parts[part];
    cut_by_chunks({pool_.num_threads(part), slice.num_down_panels(), slice.down_panel_bytes(),
                   down_unit_, round_up(num_panels, down_unit_)},
                  chunks, scratch.tasks);
    scratch_.counts[part] = scratch.tasks.size();
    for (size_t unit = 0; unit < ceil_div(num_panels, down_unit_); ++unit) {
      scratch.open_chunks[unit].store(static_cast<uint32_t>(chunks.size()),
                                      std::memory_order_relaxed);
    }
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const PanelRange& task = scratch_.parts[place.part].tasks[i];
    const Grouping::Chunk& chunk = groups_.chunks()[task.chunk];
    const Panels panels = layer_.slices_[place.part].down(chunk.expert);
    const size_t stride = point_to_activations(place, chunk);
    for_each_call(task, [&](const PanelRange& call) {
      multiply(place, panels, call, {chunk.num_rows, stride},
               products(place.part, chunk, call.first));
    });
    close_columns(place, task);
  });
}

void Layer::Run::close_columns(Pool::Place place, const PanelRange& task) {
  auto* open = scratch_.parts[place.part].open_chunks.get();
  const size_t num_panels = hidden_ / kPanelColumns;
  for (size_t first = task.first; first < task.first + task.count; first += down_unit_) {
    if (open[first / down_unit_].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
    const size_t count = std::min(down_unit_, num_panels - first);
    sum_columns(place, first, count, [&](const Grouping::Chunk& chunk, float* totals) {
      add(chunk, products(place.part, chunk, first), count, totals);
    });
  }
}

// A task is some output columns for all tokens and experts.
void Layer::Run::run_down_by_columns() {
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    cut_by_panels({pool_.num_threads(part), slice.num_down_panels(), slice.down_panel_bytes(), 1,
                   std::min(kernels_.num_panels, panels_of_totals(num_tokens_))},
                  groups_.chunks(), scratch_.parts[part].tasks);
    scratch_.counts[part] = scratch_.parts[part].tasks.size();
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const PanelRange& task = scratch_.parts[place.part].tasks[i];
    float* sums = scratch_.workers[place.worker]->sums;
    sum_columns(place, task.first, task.count, [&](const Grouping::Chunk& chunk, float* totals) {
      const Panels panels = layer_.slices_[place.part].down(chunk.expert);
      const size_t stride = point_to_activations(place, chunk);
      multiply(place, panels, task, {chunk.num_rows, stride}, sums);
      add(chunk, sums, task.count, totals);
    });
  });
}

// Adds up all experts' chunks for some columns, in order: the same whatever else is in the batch.
template <class AddChunk>
void Layer::Run::sum_columns(Pool::Place place, size_t first, size_t count, AddChunk add_chunk) {
  const bool is_whole = pool_.num_parts() == 1;
  float* totals =
      is_whole ? scratch_.workers[place.worker]->totals : part_totals(place.part, first);
  std::fill_n(totals, count * num_tokens_ * kPanelColumns, 0.0f);
  for (const uint32_t expert : groups_.active()) {
    const size_t end = groups_.end_position(expert);
    const size_t num_rows = groups_.rows_per_chunk(expert);
    for (size_t p = groups_.first_position(expert); p < end; p += num_rows) {
      add_chunk({expert, p, std::min(num_rows, end - p)}, totals);
    }
  }
  if (!is_whole) return;
  for (size_t token = 0; token < num_tokens_; ++token) {
    for (size_t i = 0; i < count; ++i) {
      write(totals + (i * num_tokens_ + token) * kPanelColumns, token, first + i);
    }
  }
}

void Layer::Run::add(const Grouping::Chunk& chunk, const float* sums, size_t num_panels,
                     float* totals) const {
  for (size_t i = 0; i < num_panels; ++i) {
    table_.accumulate(sums + i * chunk.num_rows * kPanelColumns,
                      groups_.weight_of() + chunk.first_position,
                      groups_.token_of() + chunk.first_position, chunk.num_rows,
                      totals + i * num_tokens_ * kPanelColumns);
  }
}

size_t Layer::Run::point_to_activations(Pool::Place place, const Grouping::Chunk& chunk) const {
  const void** rows = scratch_.workers[place.worker]->rows;
  for (size_t i = 0; i < chunk.num_rows; ++i) {
    rows[i] = activation_row(place.part, chunk.first_position + i);
  }
  return layer_.activation_row_[place.part];
}

// Adds the parts' totals, in the order of the parts.
void Layer::Run::sum_parts() {
  const size_t num_parts = pool_.num_parts();
  const size_t num_panels = hidden_ / kPanelColumns;
  for (size_t part = 0; part < num_parts; ++part) {
    const auto [begin, end] = share(num_panels, part, num_parts);
    scratch_.counts[part] = end - begin;
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const size_t panel = share(num_panels, place.part, num_parts).first + i;
    for (size_t token = 0; token < num_tokens_; ++token) {
      float total[kPanelColumns] = {};
      for (size_t part = 0; part < num_parts; ++part) {
        if (layer_.slices_[part].width() == 0) continue;
        const float* row = part_totals(part, panel) + token * kPanelColumns;
        for (size_t c = 0; c < kPanelColumns; ++c) total[c] += row[c];
      }
      write(total, token, panel);
    }
  });
}

void Layer::Run::write(const float* total, size_t token, size_t panel) const {
  const size_t offset = token * x_row_ + panel * kPanelColumns * dtype_bytes(args_.dtype);
  finish_(total, static_cast<std::byte*>(args_.out) + offset);
}

}  // namespace ktt
