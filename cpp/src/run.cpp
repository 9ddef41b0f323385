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
  choose_rows();
  if (makes_operands_) make_operands();
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

float* Layer::Run::part_totals(size_t part, size_t panel) const {
  return scratch_.parts[part].totals.as<float>() + panel * num_tokens_ * kPanelColumns;
}

// The caller's rows do as they are if they are operands already; not for tiles, which read some
// rows past the last one.
void Layer::Run::choose_rows() {
  makes_operands_ = convert_ != nullptr || groups_.largest_load() >= kernels_.min_tile_rows;
  rows_ = makes_operands_ ? scratch_.operands.data() : static_cast<const std::byte*>(args_.x);
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
  std::byte* row = scratch_.operands.data() + token * operand_row_;
  const std::byte* x = static_cast<const std::byte*>(args_.x) + token * x_row_;
  if (convert_ == nullptr) {
    std::memcpy(row, x, x_row_);
  } else {
    convert_(x, layer_.input_depth(), row);
  }
  const size_t top_k = args_.choices.top_k;
  for (size_t i = token * top_k; i < (token + 1) * top_k; ++i) {
    const uint32_t position = groups_.position_of()[i];
    if (position == Grouping::kNowhere) continue;
    if (is_gathered(static_cast<size_t>(args_.choices.ids[i]))) {
      std::memcpy(gathered_row(position), row, operand_row_);
    }
  }
}

void Layer::Run::multiply(Pool::Place place, const Panels& panels, size_t first, size_t count,
                          size_t num_rows, size_t row_stride) const {
  const Scratch::Worker& worker = *scratch_.workers[place.worker];
  BlockTask task;
  task.rows = worker.rows;
  task.row_stride = row_stride;
  task.num_rows = num_rows;
  task.weights = panels.weights + first * panels.panel_bytes;
  task.panel_bytes = panels.panel_bytes;
  task.scales =
      panels.scales == nullptr ? nullptr : panels.scales + first * panels.panel_scale_bytes;
  task.panel_scale_bytes = panels.panel_scale_bytes;
  task.num_panels = count;
  task.depth = panels.depth;
  task.sums = worker.sums;
  task.decode = worker.decode;
  multiply_(task);
}

void Layer::Run::run_gate_up() {
  const auto& chunks = groups_.chunks();
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    const size_t num_panels = slice.num_gate_up_panels();
    Scratch::Part& scratch = scratch_.parts[part];
    cut_by_chunks({pool_.num_threads(part), num_panels, slice.gate_up_panel_bytes(),
                   kernels_.num_panels, std::max<size_t>(num_panels, 1)},
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
  const size_t stride = point_to_operands(chunk, worker.rows);
  const size_t first_row = chunk.first_position;
  std::byte* values =
      kernels_.quantizes ? values_row(part, first_row) : activation_row(part, first_row);
  const size_t value_stride =
      kernels_.quantizes ? values_row_bytes(part) : layer_.activation_row_[part];
  const size_t end = task.first + task.count;
  for (size_t panel = task.first, count; panel < end; panel += count) {
    count = std::min(kernels_.num_panels, end - panel);
    multiply(place, panels, panel, count, chunk.num_rows, stride);
    for (size_t i = 0; i < count; ++i) {
      kernels_.swiglu(worker.sums + i * chunk.num_rows * kPanelColumns, chunk.num_rows,
                      values + (panel + i) * kTileColumns * kernels_.value_bytes, value_stride);
    }
  }
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

// Returns the stride of the rows if they lie side by side, else 0.
size_t Layer::Run::point_to_operands(const Grouping::Chunk& chunk, const void** rows) const {
  const bool gathered = is_gathered(chunk.expert);
  for (size_t i = 0; i < chunk.num_rows; ++i) {
    const size_t position = chunk.first_position + i;
    const size_t row_bytes = makes_operands_ ? operand_row_ : x_row_;
    rows[i] = gathered ? gathered_row(position) : rows_ + groups_.token_of()[position] * row_bytes;
  }
  return uses_tiles(chunk.expert) ? operand_row_ : 0;
}

// A task is some output columns for all tokens and experts: every task costs the same, and a
// token's experts are added in the order of their ids whatever else is in the batch.
void Layer::Run::run_down() {
  const bool is_whole = pool_.num_parts() == 1;
  for (size_t part = 0; part < pool_.num_parts(); ++part) {
    const ExpertSlice& slice = layer_.slices_[part];
    const size_t num_panels = slice.num_down_panels();
    const size_t most = is_whole ? panels_of_totals(num_tokens_) : num_panels;
    cut_by_panels(
        {pool_.num_threads(part), num_panels, slice.down_panel_bytes(), kernels_.num_panels,
         std::clamp<size_t>(most, 1, std::max<size_t>(num_panels, 1))},
        groups_.chunks(), scratch_.parts[part].tasks);
    scratch_.counts[part] = scratch_.parts[part].tasks.size();
  }
  pool_.parallel_for(scratch_.counts, [&](Pool::Place place, size_t i) {
    const KernelScope scope(table_);
    const PanelRange& task = scratch_.parts[place.part].tasks[i];
    if (!is_whole) {
      down(place, task, part_totals(place.part, task.first));
      return;
    }
    float* totals = scratch_.workers[place.worker]->totals;
    down(place, task, totals);
    for (size_t panel = 0; panel < task.count; ++panel) {
      write(totals + panel * num_tokens_ * kPanelColumns, task.first + panel);
    }
  });
}

void Layer::Run::down(Pool::Place place, const PanelRange& task, float* totals) {
  std::fill_n(totals, task.count * num_tokens_ * kPanelColumns, 0.0f);
  for (const uint32_t expert : groups_.active()) {
    const Panels panels = layer_.slices_[place.part].down(expert);
    const size_t end = groups_.end_position(expert);
    const size_t num_rows = groups_.rows_per_chunk(expert);
    for (size_t p = groups_.first_position(expert); p < end; p += num_rows) {
      add_chunk(place, panels, task, {expert, p, std::min(num_rows, end - p)}, totals);
    }
  }
}

void Layer::Run::add_chunk(Pool::Place place, const Panels& panels, const PanelRange& task,
                           const Grouping::Chunk& chunk, float* totals) {
  Scratch::Worker& worker = *scratch_.workers[place.worker];
  for (size_t i = 0; i < chunk.num_rows; ++i) {
    worker.rows[i] = activation_row(place.part, chunk.first_position + i);
  }
  for (size_t done = 0, count; done < task.count; done += count) {
    count = std::min<size_t>(kernels_.num_panels, task.count - done);
    multiply(place, panels, task.first + done, count, chunk.num_rows,
             layer_.activation_row_[place.part]);
    for (size_t i = 0; i < count; ++i) {
      table_.accumulate(worker.sums + i * chunk.num_rows * kPanelColumns,
                        groups_.weight_of() + chunk.first_position,
                        groups_.token_of() + chunk.first_position, chunk.num_rows,
                        totals + (done + i) * num_tokens_ * kPanelColumns);
    }
  }
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
      write_row(total, token, panel);
    }
  });
}

void Layer::Run::write(const float* totals, size_t panel) const {
  for (size_t token = 0; token < num_tokens_; ++token) {
    write_row(totals + token * kPanelColumns, token, panel);
  }
}

void Layer::Run::write_row(const float* total, size_t token, size_t panel) const {
  const size_t offset = token * x_row_ + panel * kPanelColumns * dtype_bytes(args_.dtype);
  finish_(total, static_cast<std::byte*>(args_.out) + offset);
}

}  // namespace ktt
